"""The models of the plug-in, in the form in which lmms-eval looks for them: a class in a module of the model's name."""

AVAILABLE_MODELS = {"vmemory_session": "SessionModel"}
