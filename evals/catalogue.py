"""Every benchmark by its name."""

from evals.ai2d import AI2D
from evals.benchmark import Benchmark
from evals.chartqa import ChartQA
from evals.custom import Custom
from evals.docvqa import DocVQA
from evals.gqa import GQA
from evals.hallusion_bench import HallusionBench
from evals.llava_bench import LLaVABench
from evals.mm_vet import MMVet
from evals.mmbench import MMBench, MMBenchCN
from evals.mme import MME
from evals.mmmu import MMMU
from evals.pope import POPE
from evals.realworldqa import RealWorldQA
from evals.science_qa import ScienceQA
from evals.seed_bench import SEEDBench
from evals.textvqa import TextVQA
from evals.vizwiz import VizWiz
from evals.vqav2 import VQAv2
from llava_ray.errors import ConfigError

KINDS: tuple[type[Benchmark], ...] = (
    VQAv2,
    GQA,
    VizWiz,
    ScienceQA,
    TextVQA,
    POPE,
    MME,
    MMBench,
    MMBenchCN,
    SEEDBench,
    LLaVABench,
    MMVet,
    MMMU,
    ChartQA,
    DocVQA,
    AI2D,
    RealWorldQA,
    HallusionBench,
    Custom,
)
BENCHMARKS: dict[str, type[Benchmark]] = {kind.name: kind for kind in KINDS}


# What people call them beside their names.
ALIASES = {"sqa": "science_qa", "seed": "seed_bench", "llavaw": "llava_bench", "llavabenchinthewild": "llava_bench"}


def make_benchmark(name: str) -> Benchmark:
    """Return a benchmark by name; case, dashes and underscores do not matter. Raises ConfigError."""
    plain = {known.replace("_", ""): kind for known, kind in BENCHMARKS.items()}
    plain |= {alias: BENCHMARKS[known] for alias, known in ALIASES.items()}
    kind = plain.get(name.lower().replace("-", "").replace("_", ""))
    if kind is None:
        raise ConfigError(f"there is no benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}")
    return kind()
