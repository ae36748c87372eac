"""Training of exits: one module per method, and one trainer for all methods.

A method (`method.Method`) says which part of a model is trained, and with which loss. `joint`
trains a classifier with all its exits, or only the exit heads on a frozen backbone. `layerskip`
trains a language model with early exits, `adapters` the adapters of a frozen one, `free` the same
against an adversary. `dyvte` trains gates that drop image tokens, `tower` exits of a vision tower.
`training` has `ExitTrainer`: transformers' `Trainer` with a method. Schedule, checkpoints and
resumption, precision, logging and several devices are set with `TrainingArguments`. Exits are
attached before training (`edgeexit.export.pretrained.from_pretrained`); a method only changes
weights.

    from transformers import TrainingArguments

    from edgeexit.export.methods.joint import Joint
    from edgeexit.export.methods.training import ExitTrainer
    from edgeexit.export.pretrained import from_pretrained

    classifier = from_pretrained("checkpoint", exits=[3, 6, 9], untrained=True)
    arguments = TrainingArguments("trained", learning_rate=5e-5, num_train_epochs=3)
    trainer = ExitTrainer(classifier, Joint(distillation=0.5), arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()  # from_pretrained("trained") reads the model with its exits
"""
