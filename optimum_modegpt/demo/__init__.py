"""The embedded demo: a small Llama with its text, so that everything can be tried in about a minute without network.

`text` writes the text, `train` trained the model on it; the evaluation text is about people the model never read about.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL_DIR = FOLDER / "model"
CALIBRATION_TEXT = FOLDER / "calibration.txt"
EVALUATION_TEXT = FOLDER / "evaluation.txt"

__all__ = ["CALIBRATION_TEXT", "EVALUATION_TEXT", "MODEL_DIR"]
