"""Tokenised data as samples addressed by (phase, global sample number).

:mod:`~hymba_train.data.build` opens and checks the sources; :mod:`~hymba_train.data.batches` makes tensors of them, and
alone needs torch.
"""
