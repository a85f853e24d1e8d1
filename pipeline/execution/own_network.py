"""A network of the user's own, tried as others will load it: from its model alone, in a process of its own.

Networks of this package are not: their code is in every model. The fresh process takes some seconds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipeline.contracts.columns import INPUT
from pipeline.data import DataSource, iterate_rows
from pipeline.models import Classifier, CustomParams, ModelCard, ModelParams, build_classifier, load_weights, save_model
from pipeline.models.weights import WEIGHTS_FILE
from pipeline.tracking.check import check_loads
from pipeline.tracking.served import ServedClassifier

_NUM_ROWS = 8


def check_fresh(params: ModelParams, classifier: Classifier, source: DataSource) -> None:
    """As ``check_kept``, for a network that is about to be trained: what is missing shows before, not after.

    Args:
        classifier: built from ``params``.
    """
    if not isinstance(params, CustomParams):
        return
    card = ModelCard.describe(params, classifier, {}, source.fingerprint)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(folder, classifier, card, params.code_folder)
        check_kept(params, folder, source)


def check_kept(params: ModelParams, folder: Path, source: DataSource) -> None:
    """Compares what the model of ``folder`` says of a few validation rows with the network as it is built here.

    Args:
        params: of the network, where it is the user's own; any other passes.
        folder: holds weights, card and modules.

    Raises:
        ModelError: see ``check_loads``.
    """
    if not isinstance(params, CustomParams):
        return
    classifier = build_classifier(params, source.spec)
    load_weights(classifier.network, folder / WEIGHTS_FILE)
    rows = next(iterate_rows(source.decoder("validation"), source.split("validation"), 0, 1, _NUM_ROWS))
    check_loads(folder, rows[INPUT], ServedClassifier(classifier, rows[INPUT].dtype).predict(rows[INPUT]))
