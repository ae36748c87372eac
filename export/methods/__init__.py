"""How exits learn: one module per method, and one trainer for all of them.

A method (`method.Method`) says which part of a model is trained and by what loss: `joint` trains a
classifier with all its exits, or the exit heads alone behind a frozen backbone; `layerskip` trains
a language model that can be left early, `adapters` the adapters of one that is frozen. `training`
has `ExitTrainer`, which is transformers' `Trainer` with a method: schedule, checkpoints and
resumption, precision, logging and several devices are those of `TrainingArguments`. Where exits are
is decided when they are attached (`edgeexit.export.pretrained.from_pretrained`); a method changes
weights only.

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
