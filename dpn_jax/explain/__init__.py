"""Why a network answers what it does, and what its two paths contribute: functions of a model and normalized images.

All run the model as it is, in eval mode, so that a changed one works too; where they need a DPN's parts they say so.
Maps come back raw, one value for each pixel of the input; `overlay` scales them for display.
"""

from dpn_jax.explain.display import overlay as overlay
from dpn_jax.explain.gradients import IntegratedGradients as IntegratedGradients
from dpn_jax.explain.gradients import grad_cam as grad_cam
from dpn_jax.explain.gradients import grad_cam_plus_plus as grad_cam_plus_plus
from dpn_jax.explain.gradients import integrated_gradients as integrated_gradients
from dpn_jax.explain.gradients import saliency as saliency
from dpn_jax.explain.judge import Curve as Curve
from dpn_jax.explain.judge import deletion as deletion
from dpn_jax.explain.judge import insertion as insertion
from dpn_jax.explain.judge import randomized as randomized
from dpn_jax.explain.judge import rank_correlation as rank_correlation
from dpn_jax.explain.occlusion import occlusion as occlusion
from dpn_jax.explain.paths import PathShares as PathShares
from dpn_jax.explain.paths import ablate as ablate
from dpn_jax.explain.paths import path_shares as path_shares
from dpn_jax.explain.similarity import ReceptiveField as ReceptiveField
from dpn_jax.explain.similarity import cka as cka
from dpn_jax.explain.similarity import receptive_field as receptive_field
