"""One measurement of neuralforecast, in an environment of its own: CPU seconds of fit and predict as JSON. forecast_speed.py calls it."""
import json
import logging
import sys
import time
import warnings

import pandas as pd
import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
torch.set_num_threads(1)
name, steps, windows, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
from neuralforecast import NeuralForecast  # noqa: E402
from neuralforecast import __version__ as version  # noqa: E402
from neuralforecast.losses.pytorch import MAE  # noqa: E402
from neuralforecast.models import LSTM, NHITS  # noqa: E402

shared = dict(h=12, input_size=24, loss=MAE(), scaler_type="standard", windows_batch_size=windows, batch_size=32,
              learning_rate=1e-3, random_seed=1, accelerator="cpu", enable_progress_bar=False, logger=False,
              enable_checkpointing=False, enable_model_summary=False)
own = {"LSTM": dict(encoder_hidden_size=64, encoder_n_layers=1, decoder_hidden_size=64, decoder_layers=2),
       "NHITS": dict(mlp_units=3 * [[512, 512]], n_pool_kernel_size=[2, 2, 1], n_freq_downsample=[4, 2, 1])}[name]
made = {"LSTM": LSTM, "NHITS": NHITS}[name]
frame = pd.read_csv(path, parse_dates=["ds"])
NeuralForecast(models=[made(max_steps=5, **shared, **own)], freq="MS").fit(frame)  # warm
model = NeuralForecast(models=[made(max_steps=steps, **shared, **own)], freq="MS")
began = time.process_time(); model.fit(frame); fitted = time.process_time(); model.predict(); ended = time.process_time()
print(json.dumps({"fit": fitted - began, "predict": ended - fitted, "version": version, "torch": torch.__version__,
                  "parameters": sum(p.numel() for p in model.models[0].parameters() if p.requires_grad)}))
