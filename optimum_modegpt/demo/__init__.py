"""The embedded demo: a small Llama model and its texts, to try everything in about a minute without a network.

`text` writes the texts. `train` trained the model on them. The evaluation text is about people who do not occur in the
training text.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL_DIR = FOLDER / "model"
CALIBRATION_TEXT = FOLDER / "calibration.txt"
EVALUATION_TEXT = FOLDER / "evaluation.txt"

__all__ = ["CALIBRATION_TEXT", "EVALUATION_TEXT", "MODEL_DIR"]
