from pcpo_fast.interface.comparing import compare as compare
from pcpo_fast.interface.configuration import load_config as load_config
from pcpo_fast.interface.evaluating import evaluate as evaluate
from pcpo_fast.interface.exporting import export as export
from pcpo_fast.interface.sampling import sample as sample
from pcpo_fast.interface.training import train as train

__version__: str
