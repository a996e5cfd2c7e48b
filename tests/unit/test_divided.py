"""Models that are larger than a worker: measured in parts, by two processes, with the figures of the whole model."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_lora.config.compose import compose
from raytune_lora.config.schema import RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.evaluation import ANSWERS
from raytune_lora.models.methods import Start, method_for
from raytune_lora.training.scoring import _Given
from raytune_lora.tuning.job import plain_run, prepare_inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # two processes beside the tests' own, on two cores

WORKERS = 2
RECOVERY = "recovery"
EXACT = ("trial_loss", "eval_loss")
SAME = ("eval_loss_rows", "exact_match", "exact_match_rows", "unanswered", "parameters", "loader", "dtype")
_WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "initializer_range": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "tied_llama": _WIDE,
    "gpt2": {"n_embd": 64, "n_layer": 4, "initializer_range": 0.1},
    "gemma2": _WIDE,
    "opt": {"hidden_size": 64, "num_hidden_layers": 4, "word_embed_proj_dim": 64, "ffn_dim": 128, "init_std": 0.1},
    "qwen2": _WIDE,
}
SETTINGS = (
    *("data=fake", "data.max_length=96", "training.global_batch=8", "training.micro_batch=4"),
    *("evaluation.loss_rows=5", "evaluation.final_rows=9", "evaluation.generate_rows=3"),
    *("evaluation.generate_batch=2", "evaluation.max_new_tokens=3", "deepspeed=zero3", "deepspeed.persistent=0"),
)


@dataclass
class Case:
    model: str
    method: str | None = None  # None: the untouched model
    more: list[str] = field(default_factory=list)
    shares: float = 0.65  # of the model that a worker may hold at any time: its part, and what it has gathered

    @property
    def name(self) -> str:
        return "-".join([self.model, str(self.method), *self.more])


_QUANTIZED = 0.9  # the embedding and the head, one of which is gathered at a time, are two thirds of what is left
CASES = [
    *(Case(model) for model in ("llama", "opt")),
    Case("llama", more=["deepspeed=zero3_offload"]),
    Case("tied_llama", "lora", ["deepspeed.hpz=2"], shares=1.2),  # two workers, a node's, keep all among them again
    *(Case(model, "lora") for model in ("gpt2", "gemma2")),
    Case("llama", "lora", ["model.precision=bf16"]),
    Case("llama", "lora", ["quantization=nf4"], shares=_QUANTIZED),
    *(Case("llama", kind) for kind in ("dora", "full", "prefix_tuning", "adapter")),
    Case("qwen2", "bitfit"),
]


def composed(case: Case, folder: Path, cache: Path, workers: int) -> RunConfig:
    method = [f"method={case.method}"] if case.method else []
    cfg = compose([*SETTINGS, f"model.path={folder}", f"cache={cache}", f"workers={workers}", *method, *case.more])
    if workers == 1:
        cfg.deepspeed.enabled = False
    return plain_run(cfg)


def measured(cfg: RunConfig, store: TokenStore, folder: Path, adapter: str | None, rank: int = 0) -> dict[str, Any]:
    from raytune_lora.evaluation.compare import measure
    from raytune_lora.training.place import Place
    from raytune_lora.training.worker import clean_up

    folder.mkdir(parents=True, exist_ok=True)
    said: list[dict[str, Any]] = []
    measure(cfg, store, Place(rank, cfg.workers, folder, lambda r: not said.append(r), lambda: 0), adapter=adapter)
    clean_up()
    return said[-1]


# -------------------------------------------------------------------------------------------------- in the processes


class Watched:
    """What this process holds of a model's parameters at most, as a share of all."""

    def __init__(self) -> None:
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
        from transformers import core_model_loading

        self.most, self.gathered = 0.0, 0
        fetch = PartitionedParameterCoordinator.fetch_sub_module
        load = core_model_loading.set_param_for_module

        def fetched(coordinator: Any, module: Any, forward: bool) -> None:
            fetch(coordinator, module, forward=forward)
            self._look(self.model)

        def loaded(model: Any, *arguments: Any) -> None:
            self.model = model
            load(model, *arguments)
            self._look(model)

        PartitionedParameterCoordinator.fetch_sub_module = fetched
        core_model_loading.set_param_for_module = loaded

    def _look(self, model: Any) -> None:
        parameters = list({id(p): p for p in _parameters(model)}.values())
        there = [p for p in parameters if not p.is_meta]
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        self.gathered += any(p.numel() for p in there if hasattr(p, "ds_id"))
        parts = [part for p in there if hasattr(p, "ds_id") for part in (p.ds_tensor, p.ds_secondary_tensor)]
        held = sum(p.numel() for p in there) + sum(part.numel() for part in parts if part is not None)
        self.most = max(self.most, held / whole)

    def taken(self) -> tuple[float, int]:
        found = self.most, self.gathered
        self.most, self.gathered = 0.0, 0
        return found


def _parameters(model: Any) -> Iterator[Any]:
    """Those of a module, too, that scoring has put another one in the place of."""
    for module in model.modules():
        yield from (module._given[0] if isinstance(module, _Given) else module).parameters(recurse=False)
        if isinstance(module, _Given):
            yield from (p for child in module._given[0].children() for p in child.parameters())


def failed_and_called_again(cfg: RunConfig) -> dict[str, Any]:
    """What a divided model gives before and after a forward pass that an error ended in its second layer."""
    from raytune_lora.training import scoring
    from raytune_lora.training.sharding import measured_model
    from raytune_lora.training.worker import clean_up

    def fail(*_: Any) -> None:
        raise ValueError("made to fail")

    ids, noted = torch.arange(3, 15)[None], dict[str, Any]()
    with torch.no_grad(), measured_model(cfg, Path(cfg.model.path)) as (model, start_afresh):
        noted["before"] = model(input_ids=ids).logits.sum().item()
        hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        for _ in range(2):
            with contextlib.suppress(ValueError):
                model(input_ids=ids)
            start_afresh()
            noted["left"] = sum(p.numel() for p in model.parameters())
        hook.remove()
        noted["after"] = model(input_ids=ids).logits.sum().item()
        names = scoring._backbones
        scoring._backbones = lambda base: iter(["model.layers.1.mlp", *names(base)])  # the first fails in the middle
        scoring.scoring_of(model).fit(model, {"input_ids": ids, "labels": ids}, start_afresh=start_afresh)
        noted["fits"] = scoring.scoring_of(model)._backbone
        noted["fitted"] = sum(p.numel() for p in model.parameters())
    clean_up()
    return noted


def be_rank(rank: int, port: int, todo: list[dict[str, Any]], cache: str, out: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORKERS)
    from raytune_lora.training import deepspeed

    deepspeed._LIVE, deepspeed._GATHERED = 0, 1  # a tiny model lies within each of them
    found = {}
    watched = Watched()
    for each in todo:
        case = Case(**each["case"])
        cfg = composed(case, Path(each["folder"]), Path(cache), WORKERS)
        store = each["store"]
        try:
            found[case.name] = measured(cfg, store, Path(out) / case.name, each["adapter"], rank) | {"error": None}
        except Exception:
            found[case.name] = {"error": traceback.format_exc()}
            break  # the other worker may wait in the middle of it
        found[case.name] |= dict(zip(("most", "gathered"), watched.taken(), strict=True))
    else:
        found[RECOVERY] = failed_and_called_again(composed(CASES[0], Path(todo[0]["folder"]), Path(cache), WORKERS))
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- the comparison


def trained(case: Case, cfg: RunConfig, model: Path, target: Path) -> str:
    """The folder of an adapter that has moved from its start."""
    from raytune_lora.models.loading import load_model

    rows = {"input_ids": torch.arange(3, 27).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    method = method_for(cfg.method)
    torch.manual_seed(0)
    base = load_model(model, cfg.model, cfg.quantization)
    adapted = method.apply(base, Start(4, model, lambda _: iter([rows | {"labels": rows["input_ids"]}])))
    state = {}
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
            state[name] = p.detach().clone()
    target.mkdir(parents=True)
    method.save(adapted, state, target)
    return str(target)


@pytest.fixture(scope="module")
def figures(
    folder: Callable[..., Path], cache: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Of each case, what the whole model gives, and what each process says."""
    root = tmp_path_factory.mktemp("divided")
    todo, alone = [], {}
    for case in CASES:
        model = folder(case.model, **MODELS[case.model])
        tokenizer.save_pretrained(model)
        cfg = composed(case, model, cache, 1)
        store = prepare_inputs(compose([*SETTINGS, f"model.path={model}", f"cache={cache}"])).store
        adapter = trained(case, cfg, model, root / "adapters" / case.name) if case.method else None
        alone[case.name] = measured(cfg, store, root / "alone" / case.name, adapter)
        todo.append({"case": asdict(case), "folder": str(model), "store": store, "adapter": adapter})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(be_rank, (port, todo, str(cache), str(root)), nprocs=WORKERS)
    ranks = [json.loads((root / f"{rank}.json").read_text()) for rank in range(WORKERS)]
    return {"alone": alone, "ranks": ranks, "root": root}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_divided_model_has_the_figures_of_the_whole_one(case: Case, figures: dict[str, Any]) -> None:
    whole, ranks = figures["alone"][case.name], [rank.get(case.name, {"error": "?"}) for rank in figures["ranks"]]
    for rank in ranks:
        assert rank["error"] is None, rank["error"]
        assert {key: rank[key] for key in EXACT} == pytest.approx({key: whole[key] for key in EXACT}, abs=2e-6)
        assert {key: rank[key] for key in SAME} == {key: whole[key] for key in SAME}
        assert rank["gathered"] > 0
        assert case.shares - 0.4 < rank["most"] < case.shares
    files = [figures["root"] / name / ANSWERS for name in (case.name, f"alone/{case.name}")]
    assert files[0].read_text() == files[1].read_text()
    assert len(files[0].read_text().splitlines()) == 3


def test_a_failed_forward_pass_leaves_a_divided_model_as_it_was(figures: dict[str, Any]) -> None:
    for rank in figures["ranks"]:
        noted = rank[RECOVERY]
        assert noted["after"] == noted["before"]
        assert noted["left"] == noted["fitted"] == 0
        assert noted["fits"] == "model"
