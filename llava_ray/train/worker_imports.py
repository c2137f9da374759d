"""What the processes of a run import; a fork server imports this module once for them all (see ``worker_forks``)."""


from llava_ray.train.deepspeed_import import import_deepspeed

import_deepspeed()
