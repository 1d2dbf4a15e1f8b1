"""Mixtures of closed-form ridge experts for stellar spectra, and the gates that mix them.

In the order of the data: ``survey`` (types, HDF5), ``simulate`` (model grid to survey), ``cells``, ``ridge``, ``experts``,
``features``, ``classifier``, ``gates``, ``optimize``, ``training``, ``routing``, ``controls``, ``joint``, ``metrics``,
``bootstrap``, ``intervals``, ``variance``, then ``evaluation``, ``figures``, ``report``. To apply and to trust: ``model``,
``observed``, ``resample``, ``novelty``, ``uncertainty``, ``conformal``, ``fisher``, ``application``, ``catalogue``. For any data:
``mixture``, ``estimator``.

Dimensions in docstrings and annotations: N stars, P pixels, K experts (or cells), F gate features, B bootstrap resamples,
A alphas, E epochs, G groups, R components of the model grid.
"""

from moe_jax.arrays import InputError as InputError
from moe_jax.bootstrap import Bootstrap as Bootstrap
from moe_jax.bootstrap import bootstrap_delta_r2 as bootstrap_delta_r2
from moe_jax.bootstrap import bootstrap_gain as bootstrap_gain
from moe_jax.bootstrap import paired_bootstrap as paired_bootstrap
from moe_jax.cells import CELL_NAMES as CELL_NAMES
from moe_jax.cells import assign_cells as assign_cells
from moe_jax.cells import nearest_cells as nearest_cells
from moe_jax.classifier import ClassifierFit as ClassifierFit
from moe_jax.classifier import fit_classifier as fit_classifier
from moe_jax.conformal import calibrate as calibrate
from moe_jax.controls import fit_mlp_regressor as fit_mlp_regressor
from moe_jax.controls import fit_temperature as fit_temperature
from moe_jax.controls import predict_mlp_regressor as predict_mlp_regressor
from moe_jax.controls import simplex_weights as simplex_weights
from moe_jax.cross_validation import AlphaChoice as AlphaChoice
from moe_jax.cross_validation import CrossValidatedRidge as CrossValidatedRidge
from moe_jax.cross_validation import RidgeCV as RidgeCV
from moe_jax.cross_validation import cross_validate_ridge as cross_validate_ridge
from moe_jax.cross_validation import select_alpha as select_alpha
from moe_jax.estimator import RidgeMixtureRegressor as RidgeMixtureRegressor
from moe_jax.experts import Experts as Experts
from moe_jax.experts import assign_folds as assign_folds
from moe_jax.experts import cross_fitted_predictions as cross_fitted_predictions
from moe_jax.experts import fit_experts as fit_experts
from moe_jax.experts import fit_global as fit_global
from moe_jax.experts import predict_experts as predict_experts
from moe_jax.features import FEATURE_NAMES as FEATURE_NAMES
from moe_jax.features import FeatureModel as FeatureModel
from moe_jax.features import compute_features as compute_features
from moe_jax.features import fit_features as fit_features
from moe_jax.fisher import cramer_rao as cramer_rao
from moe_jax.gates import Gate as Gate
from moe_jax.gates import LinearGate as LinearGate
from moe_jax.gates import MLPGate as MLPGate
from moe_jax.gates import linear_params as linear_params
from moe_jax.grid import SpectralGrid as SpectralGrid
from moe_jax.grid import interpolate_grid as interpolate_grid
from moe_jax.grid import load_grid as load_grid
from moe_jax.joint import backfit_mixture_experts as backfit_mixture_experts
from moe_jax.joint import fit_mixture_experts as fit_mixture_experts
from moe_jax.metrics import GroupScores as GroupScores
from moe_jax.metrics import mae as mae
from moe_jax.metrics import r2_by_group as r2_by_group
from moe_jax.metrics import r2_score as r2_score
from moe_jax.metrics import retention as retention
from moe_jax.metrics import rmse as rmse
from moe_jax.mixture import MixtureOfExperts as MixtureOfExperts
from moe_jax.mixture import MoEPrediction as MoEPrediction
from moe_jax.mixture import fit_moe as fit_moe
from moe_jax.mixture import predict_moe as predict_moe
from moe_jax.model import MixturePrediction as MixturePrediction
from moe_jax.model import Model as Model
from moe_jax.model import load_model as load_model
from moe_jax.model import predict_model as predict_model
from moe_jax.model import save_model as save_model
from moe_jax.optimize import GateConfig as GateConfig
from moe_jax.optimize import GateFit as GateFit
from moe_jax.optimize import Hyper as Hyper
from moe_jax.ridge import Ridge as Ridge
from moe_jax.ridge import fit_ridge as fit_ridge
from moe_jax.ridge import fit_weighted_ridge as fit_weighted_ridge
from moe_jax.ridge import predict_ridge as predict_ridge
from moe_jax.routing import route_fallback as route_fallback
from moe_jax.routing import route_hard as route_hard
from moe_jax.routing import route_oracle as route_oracle
from moe_jax.routing import route_soft as route_soft
from moe_jax.routing import sharpen as sharpen
from moe_jax.simulate import simulate_survey as simulate_survey
from moe_jax.survey import Labels as Labels
from moe_jax.survey import Survey as Survey
from moe_jax.survey import add_noise as add_noise
from moe_jax.survey import load_survey as load_survey
from moe_jax.survey import save_survey as save_survey
from moe_jax.training import fit_gate as fit_gate
from moe_jax.training import fit_gates as fit_gates
from moe_jax.training import mixture_loss as mixture_loss
from moe_jax.uncertainty import ridge_leverage as ridge_leverage
from moe_jax.variance import required_stars as required_stars
from moe_jax.variance import variance_components as variance_components
