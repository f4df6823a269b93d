"""A plug-in for lmms-eval: `LMMS_EVAL_PLUGINS=vmemory.eval.lmms` makes the model `vmemory_session` known to it."""
