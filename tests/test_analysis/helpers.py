"""What tests of the analysis share: small calibrated models with the float weights beside the quantized ones."""

from ptqsam.analysis.sensitivity import Subject
from ptqsam.analysis.switches import Switches
from ptqsam.modules.walk import quant_ops
from ptqsam.solver.freeze import freeze
from ptqsam.solver.rules import RuleBook
from tests.test_reconstruction.helpers import calibrated_model, make_recipe


def make_subject(arch='vit', recipe=None):
    """A subject, and samples: images with 3, 2 and 1 boxes."""
    recipe = recipe or make_recipe()
    model, samples = calibrated_model(arch, recipe)
    plain = {name: op.weight.detach().clone() for name, op, _ in quant_ops(model.sam)}
    freeze(model.sam)
    return Subject(model, Switches(model.sam, plain), RuleBook(recipe), 'own'), [s for s in samples if len(s.boxes)]
