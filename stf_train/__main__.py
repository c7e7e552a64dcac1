"""python -m stf_train is stf-train, for launchers of several processes."""

from stf_train.cli import train

train()
