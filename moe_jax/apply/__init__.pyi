from .conformal import calibrate as calibrate
from .model import MixturePrediction as MixturePrediction
from .model import Model as Model
from .model import predict_model as predict_model
from .model_file import load_model as load_model
from .model_file import save_model as save_model
from .uncertainty import ridge_leverage as ridge_leverage
