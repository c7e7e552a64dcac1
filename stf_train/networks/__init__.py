"""The networks F; all are called alike.

    F(x, c_noise, labels=None, augment=None)

x is [B, C, H, W] and comes back in the same shape, c_noise is [B], labels [B] with -1 for a class
that was dropped, augment [B, augmentation] says how an image was augmented. Every network starts
as F = 0. For mixed precision call them under `torch.autocast`; their weights stay in float32. The
classifier is another matter: it has logits instead.
"""

from stf_train.networks.adm import ADM, ADMSettings
from stf_train.networks.classifier import Classifier
from stf_train.networks.ncsnpp import SETTINGS, NCSNpp, Settings
from stf_train.networks.unet import UNet

__all__ = ["ADM", "SETTINGS", "ADMSettings", "Classifier", "NCSNpp", "Settings", "UNet"]
