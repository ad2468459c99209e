"""Gradient sparsification and sparse projection for training-data attribution: the reproducible companion to GraSS.

The road is ``experiments -> gradients -> projection -> store -> attribution -> evaluation -> report``; each folder is one
stretch of it. The names below are the ones that notebooks and users call.
"""
