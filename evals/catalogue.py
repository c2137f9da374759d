"""The registry of benchmarks."""

from evals.benchmark import Benchmark
from evals.benchmarks.ai2d import AI2D
from evals.benchmarks.amber import AMBERDiscriminative, AMBERGenerative
from evals.benchmarks.blink import Blink
from evals.benchmarks.chair import CHAIR
from evals.benchmarks.chartqa import ChartQA
from evals.benchmarks.custom import Custom
from evals.benchmarks.docvqa import DocVQA
from evals.benchmarks.gqa import GQA
from evals.benchmarks.hallusion_bench import HallusionBench
from evals.benchmarks.llava_bench import LLaVABench
from evals.benchmarks.mathvista import MathVista
from evals.benchmarks.mm_vet import MMVet
from evals.benchmarks.mmbench import MMBench, MMBenchCN
from evals.benchmarks.mmbench_v11 import MMBenchV11, MMBenchV11CN
from evals.benchmarks.mme import MME
from evals.benchmarks.mmhal_bench import MMHalBench
from evals.benchmarks.mmmu import MMMU
from evals.benchmarks.mmmu_pro import MMMUPro, MMMUPro4, MMMUProVision
from evals.benchmarks.mmstar import MMStar
from evals.benchmarks.object_halbench import ObjectHalBench
from evals.benchmarks.ocrbench import OCRBench
from evals.benchmarks.pope import POPE
from evals.benchmarks.realworldqa import RealWorldQA
from evals.benchmarks.science_qa import ScienceQA
from evals.benchmarks.seed_bench import SEEDBench
from evals.benchmarks.textvqa import TextVQA
from evals.benchmarks.vizwiz import VizWiz
from evals.benchmarks.vqav2 import VQAv2
from llava_ray.errors import ConfigError

_KINDS: tuple[type[Benchmark], ...] = (
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
    MMBenchV11,
    MMBenchV11CN,
    MMStar,
    MMMUPro,
    MMMUPro4,
    MMMUProVision,
    MathVista,
    OCRBench,
    Blink,
    CHAIR,
    AMBERGenerative,
    AMBERDiscriminative,
    MMHalBench,
    ObjectHalBench,
    Custom,
)
BENCHMARKS: dict[str, type[Benchmark]] = {kind.name: kind for kind in _KINDS}


# Common aliases.
_ALIASES = {"sqa": "science_qa", "seed": "seed_bench", "llavaw": "llava_bench", "llavabenchinthewild": "llava_bench"}
_ALIASES |= {"mmbenchv1.1": "mmbench_v11", "mmbenchcnv1.1": "mmbench_v11_cn", "mmmupro10": "mmmu_pro"}


def make_benchmark(name: str) -> Benchmark:
    """Build a benchmark by name, ignoring case, dashes and underscores. Raises ConfigError."""
    plain = {known.replace("_", ""): kind for known, kind in BENCHMARKS.items()}
    plain |= {alias: BENCHMARKS[known] for alias, known in _ALIASES.items()}
    kind = plain.get(name.lower().replace("-", "").replace("_", ""))
    if kind is None:
        raise ConfigError(f"there is no benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}")
    return kind()
