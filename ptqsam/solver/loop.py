"""The loop: prepare -> calibrate -> freeze -> evaluate -> report. A test loop of mmengine's Runner."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.registry import LOOPS
from mmengine.runner import Runner, TestLoop

from ptqsam import __version__
from ptqsam.checkpoint import float_bytes, load_packed, packed_size, save_packed, structure
from ptqsam.config import parse_quant_config
from ptqsam.distributed import decided_by_main, demand_same
from ptqsam.evaluation import QuantizationError, measure_quantization_error
from ptqsam.fileio import fingerprint
from ptqsam.modules.walk import quantizers
from ptqsam.places import without_places
from ptqsam.progress import progress
from ptqsam.reconstruction.optimise import Outcome
from ptqsam.registry import SOLVER_HOOKS, build_part
from ptqsam.report import Gallery, plot_outcomes, write_outcomes
from ptqsam.shared_work import SharedWork
from ptqsam.solver.calibrate import calibrate_activations, calibrate_weights, check_calibration
from ptqsam.solver.compat import apply_compat, report_gate
from ptqsam.solver.datasets import build_calib_loader, build_dataset, data_identity, image_names
from ptqsam.solver.float_metrics import own_metrics, shared_metrics
from ptqsam.solver.freeze import check_gate, freeze
from ptqsam.solver.options import RunOptions
from ptqsam.solver.outputs import megabytes, peak_memory_mb, remove_stale, write_result
from ptqsam.solver.prepare import check_hooks, quantize_model
from ptqsam.solver.reconstruct import ReconstructionStage, check_reconstruction
from ptqsam.solver.resume import check_same, find_packed
from ptqsam.solver.rules import RuleBook
from ptqsam.solver.share import share_model
from ptqsam.solver.shared_calibration import SharedCalibration

# images on which the error of the activation quantizers is measured
ERROR_IMAGES = 2


@LOOPS.register_module()
class PTQLoop(TestLoop):
    """Quantize the SAM of a detector-prompted model and evaluate it.

    At each stage the runner's hooks are called: `before_<stage>` and `after_<stage>` for load, evaluate_fp, prepare,
    calibrate, freeze, evaluate and report, and `after_failure` if one fails. After the hooks of `before_evaluate`
    stands the gate, with nothing between it and packing and evaluation.

    Args:
        runner: mmengine runner; its model has a child `sam` and a method `attach_boxes`.
        dataloader: config of the loader of evaluated images.
        evaluator: metrics.
        recipe: quant config as plain dicts.
        calib_dataset: config of the dataset that calibration images are drawn from.
        options: fields of `RunOptions`.

    Attributes:
        result: content of `result.json`, after `run`.
        errors: quantizer path -> quantization error, after calibration.
        outcomes: unit -> what reconstruction did to it, after the stage `reconstruct`.
        seconds: finished stage -> its time.
        memory_mb: finished stage -> largest memory use of this process until its end.
        shared: work of other runs, if this one is to take part in it.
        shared_calibration: the part of it that calibration takes, and hooks before it.
        violations: what the gate would refuse; of a run with compat switches, others stop.
        rules: rules and what they decided.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: dict[str, Any],
        evaluator: Evaluator | dict | list,
        recipe: dict[str, Any],
        calib_dataset: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self.options = RunOptions(**options)
        dataset = build_dataset(dataloader['dataset'])
        self.evaluated_split = image_names(dataset)
        # get_subset_ refuses the whole dataset as a subset of itself
        if self.options.limit is not None and self.options.limit < len(dataset):
            dataset.get_subset_(self.options.limit)
        super().__init__(runner, dict(dataloader, dataset=dataset), evaluator)
        for metric in self.evaluator.metrics:
            metric.collect_device = 'gpu'  # through the process group, whatever it runs on, not through a shared folder
        self.recipe = parse_quant_config(recipe, 'test_cfg.recipe')
        self.calib_dataset = calib_dataset
        self.rules = RuleBook(self.recipe)
        self.errors: dict[str, QuantizationError] = {}
        self.seconds: dict[str, float] = {}
        self.memory_mb: dict[str, float] = {}
        self.metrics: dict[str, dict[str, float] | None] = dict(fp=None, quant=None)
        self.size_mb: dict[str, float] = {}
        self.result: dict[str, Any] = {}
        self.violations: list[str] = []
        self.outcomes: dict[str, Outcome] = {}
        self.shared = SharedWork(Path(self.options.cache_dir)) if self.options.share_work else None
        self.shared_calibration: SharedCalibration | None = None
        show_dir = self.options.show_dir
        self.gallery = Gallery(Path(show_dir), self.dataloader.dataset) if show_dir else None
        check_reconstruction(self.recipe)
        for part in self.recipe.hooks:
            runner.register_hook(build_part(SOLVER_HOOKS, part.type, **part.kwargs()))

    @property
    def work_dir(self) -> Path:
        """Where results go."""
        return Path(self.runner.work_dir)

    @property
    def model(self) -> Any:
        """The detector-prompted SAM, without a distributed wrapper."""
        model = self.runner.model
        return getattr(model, 'module', model)

    @property
    def target(self) -> torch.nn.Module:
        """The part of the model that is quantized."""
        return self.model.sam

    def run(self) -> dict[str, Any]:
        """Run all stages.

        Returns:
            Metrics of the quantized model.
        """
        try:
            self.run_stages()
        except BaseException:
            self.runner.call_hook('after_failure')
            raise
        return self.metrics['quant'] or {}

    def run_stages(self) -> None:
        """Stage after stage, with the gate before evaluation."""
        self.model.eval()
        with self.stage('load'):
            origin, ready = self.load_model()
        if self.options.eval_fp:
            with self.stage('evaluate_fp'):
                self.metrics['fp'] = self.evaluate_float()
        with self.stage('prepare'):
            self.prepare(ready)
        if ready is None:
            with self.stage('calibrate'):
                self.calibrate(origin)
            if self.recipe.reconstruction is not None:
                with self.stage('reconstruct'):
                    self.reconstruct(origin)
            with self.stage('freeze'):
                self.errors |= freeze(self.target)
        with self.stage('evaluate'):
            # the last hook has run: what the gate sees is what is packed and evaluated
            if self.recipe.compat.active:
                self.violations = report_gate(self.target, self.rules.enabled, self.recipe.compat)
                for violation in self.violations:
                    self.runner.logger.info(violation)
            else:
                check_gate(self.target, self.rules.enabled)
            if ready is None:
                decided_by_main(lambda: self.pack(origin))
            self.metrics['quant'] = self.evaluate('quant')
        with self.stage('report'):
            self.report()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Call the hooks around a stage; take its time with that of the hooks before it, and the memory used so far."""
        start = time.perf_counter()
        self.runner.call_hook(f'before_{name}')
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.memory_mb[name] = peak_memory_mb()
        self.runner.call_hook(f'after_{name}')

    def load_model(self) -> tuple[dict[str, Any], Path | None]:
        """Load weights, attach prompt boxes, look for what an earlier run left.

        Returns:
            What the result depends on, and the folder of the packed checkpoint if there is one to go on from.
        """
        options = self.options
        origin: dict[str, Any] = {}
        ready: Path | None
        if options.load:
            ready = Path(options.load)
            demand_same(self.model.origin())
        else:
            check_calibration(self.recipe, self.model.options.chunk_size)
            self.calib_loader = build_calib_loader(
                self.calib_dataset, self.recipe, self.evaluated_split, self.dataloader.num_workers, self.runner.logger
            )
            origin = self.origin()
            demand_same(origin)
            self.shared_calibration = self.share_calibration(origin)
            ready = decided_by_main(lambda: find_packed(self.work_dir / 'packed', origin) if options.resume else None)
            if ready is not None:
                self.runner.logger.info(f'resume: calibrated model from {ready}')
        if is_main_process():
            remove_stale(self.work_dir, ready)
        if options.eval_fp or ready is None:
            self.model.init_weights()
        if ready is None:
            # fewer, so that what is missing shows sooner
            self.model.attach_boxes(self.calib_loader.dataset, Path(options.cache_dir))
        self.model.attach_boxes(self.dataloader.dataset, Path(options.cache_dir))
        return origin, ready

    def prepare(self, ready: Path | None) -> None:
        """Put the quantizers in: those of the rules, or those of a packed checkpoint."""
        self.float_structure = structure(self.target)
        self.size_mb['fp'] = megabytes(float_bytes(self.target))
        if ready is None:
            quantize_model(self.target, self.rules)
            apply_compat(self.target, self.recipe.compat)
            check_hooks(self.runner.hooks, self.target, self.rules.choices)
            return
        manifest, self.rules = load_packed(ready, self.target)
        own_weights = self.model.origin()['checkpoint'] if self.options.eval_fp else None
        check_same(ready, manifest, self.recipe, own_weights)
        self.errors = {path: QuantizationError.from_plain(error) for path, error in manifest['errors'].items()}
        self.size_mb['packed'] = megabytes(packed_size(ready))

    def origin(self) -> dict[str, Any]:
        """What a quantized model depends on; a resumed run must agree in all of it."""
        return dict(
            ptqsam=__version__,
            recipe=fingerprint(self.recipe.plain()),
            model_config=fingerprint(without_places(self.runner.cfg.model.to_dict())),
            calibration_data=data_identity(self.calib_loader.dataset, self.calib_dataset),
            **self.model.origin(),
        )

    def calibrate(self, origin: dict[str, Any]) -> None:
        """Set the parameters of all quantizers, or take them from an interrupted run that was to be reconstructed.

        Args:
            origin: what they depend on.
        """
        calibration = self.recipe.calibration
        stage = ReconstructionStage(self.recipe, self.work_dir / 'reconstruction', origin)
        reconstructed = self.recipe.reconstruction is not None
        resumed = reconstructed and self.options.resume and decided_by_main(lambda: stage.load_calibrated(self.target))
        if not resumed:
            shared = self.shared_calibration
            settings = (calibration.max_boxes, calibration.seed)
            with self.embeddings_of_others():
                calibrate_activations(self.model, self.target, self.calib_loader, *settings, shared)
            calibrate_weights(self.target, shared)
            if reconstructed and is_main_process():
                stage.clear()
                stage.save_calibrated(self.target)
        share_model(self.target)

    def share_calibration(self, origin: dict[str, Any]) -> SharedCalibration | None:
        """Take what other runs have found that calibrate on the same images.

        Args:
            origin: what the result depends on.
        """
        if self.shared is None:
            return None
        conditions = {name: value for name, value in origin.items() if name != 'recipe'} | dict(
            max_boxes=self.recipe.calibration.max_boxes,
            seed=self.recipe.calibration.seed,
            processes=get_world_size(),  # sums are added in another order
        )
        return SharedCalibration(self.shared, self.target, conditions)

    def reconstruct(self, origin: dict[str, Any]) -> None:
        """Learn the rounding of weights and the scales of activations, unit by unit.

        Units follow one another, so the main process learns, and the others wait for the result.

        Args:
            origin: what the result depends on.
        """
        stage = ReconstructionStage(self.recipe, self.work_dir / 'reconstruction', origin)

        def learn() -> None:
            engine = stage.run(self.model, self.target, self.calib_loader, self.runner.call_hook)
            self.errors |= engine.errors
            self.outcomes = engine.outcomes
            write_outcomes(self.work_dir / 'reconstruction.csv', self.outcomes)
            plot_outcomes(self.work_dir / 'reconstruction.png', self.outcomes)

        decided_by_main(learn)
        share_model(self.target)

    def pack(self, origin: dict[str, Any]) -> None:
        """Measure the error of the activation quantizers, and write the packed checkpoint of an honest model.

        One process does.
        """
        batches = itertools.islice(self.calib_loader, ERROR_IMAGES)
        self.errors |= measure_quantization_error(self.model, self.target, batches)
        if not self.recipe.compat.active:
            errors = {path: error.plain() for path, error in self.errors.items()}
            size = save_packed(
                self.work_dir / 'packed', self.target, self.float_structure, self.recipe.plain(), origin, errors
            )
            self.size_mb['packed'] = megabytes(size)

    def evaluate_float(self) -> dict[str, float]:
        """Metrics of the float model; taken from an earlier run when resuming, unless pictures are wanted.

        With shared work they are taken from any run, and the pictures' masks as well.
        """
        config = self.runner.cfg
        conditions = self.model.origin() | dict(
            ptqsam=__version__,
            model_config=fingerprint(without_places(config.model.to_dict())),
            evaluator=fingerprint(without_places(config.test_evaluator)),
            data=data_identity(self.dataloader.dataset, config.test_dataloader.dataset),
            batch_size=self.dataloader.batch_size,
        )

        def evaluate() -> dict[str, float]:
            return self.evaluate('fp')

        if self.shared is not None:
            return shared_metrics(self.shared, conditions, evaluate, self.gallery)
        known = self.options.resume and self.gallery is None
        return own_metrics(self.work_dir / 'fp.json', conditions, evaluate, known)

    @contextmanager
    def embeddings_of_others(self, off: bool = False) -> Iterator[None]:
        """Let the model take embeddings from other runs meanwhile, if all of its encoder is in float.

        Several processes each encode other images, but share work together, so they do not take any.

        Args:
            off: quantizers that it has are off, and stay so. Default False: it must not have any.
        """
        encoder = self.target.get_submodule('image_encoder')
        if self.shared is None or get_world_size() > 1 or (any(quantizers(encoder)) and not off):
            yield
            return
        with self.model.embeddings_of_others(self.shared):
            yield

    @torch.no_grad()
    def evaluate(self, what: str) -> dict[str, float]:
        """Metrics of the model as it is now.

        Args:
            what: 'fp' or 'quant', for the progress bar and the pictures.

        Returns:
            Metric name without its prefix -> value.
        """
        if self.recipe.compat.keep_drop_prob:
            torch.manual_seed(self.options.seed)  # what is dropped decides the metrics
        with self.embeddings_of_others():
            for batch in progress(self.dataloader, f'evaluate {what}', 'image'):
                outputs = self.runner.model.test_step(batch)
                if self.gallery is not None:
                    self.gallery.add(what, outputs)
                self.evaluator.process(data_samples=outputs, data_batch=batch)
        if self.gallery is not None:
            self.gallery.finish()
        metrics = self.evaluator.evaluate(len(self.dataloader.dataset))
        return {key.split('/')[-1]: float(value) for key, value in metrics.items()}

    def report(self) -> None:
        """Write `result.json`, `summary.csv` and a plot of it."""
        options = self.options
        self.result = dict(
            model=options.model,
            quant=options.quant,
            algorithm=self.recipe.algorithm,
            bits=self.recipe.bits.resolved(),
            quantized=self.rules.bit_counts(),
            metrics=dict(self.metrics),
            size_mb=dict(self.size_mb),
            seconds=dict(self.seconds),
            peak_memory_mb=max(all_gather_object(peak_memory_mb())),
            compat=self.recipe.compat.active,
            violations=len(self.violations),
            seed=options.seed,
            images=len(self.dataloader.dataset),
            work_dir=str(self.work_dir),
            processes=get_world_size(),
            shared=[] if self.shared is None else self.shared.taken,
        )
        if is_main_process():
            write_result(self.work_dir, self.result, self.rules.enabled, self.errors)
