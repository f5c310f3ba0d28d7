from orchestrator.api import Chosen as Chosen
from orchestrator.api import Evaluation as Evaluation
from orchestrator.api import Experiment as Experiment
from orchestrator.api import Gate as Gate
from orchestrator.api import ModelComparison as ModelComparison
from orchestrator.api import Reproduction as Reproduction
from orchestrator.api import RunResult as RunResult
from orchestrator.api import check as check
from orchestrator.api import compare as compare
from orchestrator.api import evaluate as evaluate
from orchestrator.api import open_run as open_run
from orchestrator.api import reproduce as reproduce
from orchestrator.api import resume as resume
from orchestrator.api import run as run

__version__: str
