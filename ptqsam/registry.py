"""One registry per kind of part. A part is imported when a config first names it (``locations``)."""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import Registry

OBSERVERS = Registry('observer', scope='ptqsam', locations=['ptqsam.observers'])
QUANTIZERS = Registry('quantizer', scope='ptqsam', locations=['ptqsam.quantizers'])
# keyed by the qualified name of the class that is replaced, for example 'torch.nn.modules.linear.Linear'
QUANT_MODULES = Registry('quant module', scope='ptqsam', locations=['ptqsam.modules'])
SOLVER_HOOKS = Registry('solver hook', parent=MMENGINE_HOOKS, scope='ptqsam', locations=['ptqsam.report'])
