"""The model: a vision tower, a projector and a language model, composed of ordinary modules. No ray.

``network`` has the modules, ``lora`` their adapters, ``tensors`` the weight files and ``formats`` the layouts of model
folders. ``assembly`` builds a model from a config, ``saving`` writes it as one self-describing folder (a bundle),
``loading`` loads any model folder, and ``freezing`` sets which parameters are trained.
"""
