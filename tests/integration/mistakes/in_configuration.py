"""Mistakes in what is typed."""

from __future__ import annotations

from tests.integration.mistakes.table import Place, mistake


@mistake("a key that does not exist")
def _(place: Place) -> list[str]:
    return place.distill("train.epohcs=3")


@mistake("a choice that does not exist")
def _(place: Place) -> list[str]:
    return place.distill("loss=kdd")


@mistake("a word for a number")
def _(place: Place) -> list[str]:
    return place.distill("train.optimizer.lr=fast")


@mistake("a fraction for a whole number")
def _(place: Place) -> list[str]:
    return place.distill("train.batch_size=32.5")


@mistake("temperature 0")
def _(place: Place) -> list[str]:
    return place.distill("loss.temperature=0")


@mistake("two mistakes at once", num_lines=3)
def _(place: Place) -> list[str]:
    return place.distill("train.batch_size=0", "student.hiden=[4]")


@mistake("a bracket that is not closed")
def _(place: Place) -> list[str]:
    return place.distill("train.optimizer.betas=[0.9,0.99")


@mistake("no `=`")
def _(place: Place) -> list[str]:
    return place.distill("student")


@mistake("all weights of the loss 0")
def _(place: Place) -> list[str]:
    return place.distill("loss.kd_weight=0", "loss.ce_weight=0")


@mistake("a metric that does not exist")
def _(place: Place) -> list[str]:
    return place.distill("train.select_by=val/acuracy")


@mistake("warm-up longer than the run")
def _(place: Place) -> list[str]:
    return place.distill("train.optimizer.warmup_epochs=5")


@mistake("blocks that the workers cannot share")
def _(place: Place) -> list[str]:
    return place.distill("cluster.num_workers=2", "train.blocks_per_step=3")


@mistake("workers that share a GPU")
def _(place: Place) -> list[str]:
    return place.distill("cluster.num_workers=2", "cluster.num_gpus_per_worker=0.5")


@mistake("distilling without a teacher's weights")
def _(place: Place) -> list[str]:
    return place.distill("teacher.checkpoint=null")


@mistake("training a teacher by a loss that needs one")
def _(place: Place) -> list[str]:
    return place.train("loss=kd")


@mistake("`evaluate` without a run")
def _(place: Place) -> list[str]:
    return ["evaluate"]


@mistake("a correlation of seven rows")
def _(place: Place) -> list[str]:
    return place.distill("loss=dist", "train.batch_size=7")


@mistake("a coefficient of PTLoss that is too small")
def _(place: Place) -> list[str]:
    return place.distill("loss=ptloss", "loss.perturbation=[0.5,-0.6]")


@mistake("a file of coefficients that is not there")
def _(place: Place) -> list[str]:
    return place.distill("loss=ptloss", "loss.perturbation_from=nobody.json")


@mistake("coefficients selected for another temperature")
def _(place: Place) -> list[str]:
    return place.distill("loss=ptloss", "loss.perturbation_from=auto", "loss.temperature=4")


@mistake("`select-perturbation` without a teacher's weights")
def _(place: Place) -> list[str]:
    return ["select-perturbation", "data=digits", "cluster=inprocess"]


@mistake("coefficients from a handful of rows")
def _(place: Place) -> list[str]:
    return place.distill("loss=ptloss", "loss.perturbation_from=auto", "data.validation_fraction=0.01")


@mistake("a schedule of no key")
def _(place: Place) -> list[str]:
    return place.distill("loss.schedule.temprature={to: 1}")


@mistake("an unknown part of a loss")
def _(place: Place) -> list[str]:
    return place.distill("loss=combined", "loss.parts={kdd: {}}")


@mistake("mixed images for a loss of one label a row")
def _(place: Place) -> list[str]:
    return place.distill("loss=dkd", "data.augment.mixup=0.2")


@mistake("a password in `tracking.uri`")
def _(place: Place) -> list[str]:
    return place.distill("tracking.uri=http://me:secret@127.0.0.1:9")
