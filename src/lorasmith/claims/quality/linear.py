"""The cheap baseline for classification: TF-IDF and a linear support vector machine, in seconds."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from lorasmith.claims.quality.arms import Data

EXTRA = 'needs scikit-learn: pip install "lorasmith[claims]"'


def is_available() -> bool:
    """Whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


def classified(data: Data) -> dict[str, Any]:
    """Labels of the test records by LinearSVC (C = 1) over TF-IDF of words 1-2 and characters 2-4; the seconds.

    Trained on what the other methods have in one epoch; a label for out of scope is one label more.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.svm import LinearSVC

    started = time.monotonic()
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
    )
    model = make_pipeline(features, LinearSVC(random_state=0))
    model.fit([row["prompt"] for row in data.train], [row["completion"] for row in data.train])
    outputs = [str(label) for label in model.predict([row["prompt"] for row in data.test])]
    size = int(model[-1].coef_.size + model[-1].intercept_.size)
    return {"outputs": outputs, "params": size, "train_s": time.monotonic() - started}
