"""How exits learn: functions that a training script calls, one module per method.

`joint` trains a classifier with all its exits, or the exit heads alone behind a frozen backbone,
with optional distillation from the last exit; `layerskip` trains a language model that can be left
early, and `adapters` the adapters of one that is frozen. `training` is the loop they share. A
method changes weights only; where exits stand is said when they are attached
(`edgeexit.export.pretrained.from_pretrained`), and what they score is in the graph.
"""
