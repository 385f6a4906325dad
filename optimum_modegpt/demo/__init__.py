"""The embedded demo: a small Llama model and its texts, to try everything in about a minute without a network.

The evaluation text is about people who do not occur in the training text.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL_DIR = FOLDER / "model"
CALIBRATION_TEXT = FOLDER / "calibration.txt"
EVALUATION_TEXT = FOLDER / "evaluation.txt"
