#!/usr/bin/env bash
# Tokenizes an image or a video with the continuous (VAE) model and writes, into output_folder: the
# token file, report.json, the reconstruction beside the original, and a plot.
#
#   bash scripts/run_inference_vae.sh
#   input_path=clip.mp4 output_folder=out bash scripts/run_inference_vae.sh --threshold=0.006
#   checkpoint_path=OUT/pretrained bash scripts/run_inference_vae.sh    # a model trained here
#
# Further flags go to scripts/inference.py (--help lists them); a flag given twice counts as given
# last. Paths are relative to where one stands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_paths.sh"

read_paths checkpoint_path input_path
written_paths output_folder
# --- Fill in here, or set in the environment -----------------------------------------------------
# The model:
# - the file `params` downloaded from https://huggingface.co/LargeWorldModel/ElasticTok-VAE, with or
#   without "params::" before it, or LargeWorldModel/ElasticTok-VAE, which downloads it;
# - a folder such as example/vae or the folder pretrained/ of a training run, or a file such as
#   OUT/streaming_train_state or DIR/model.safetensors;
# - whatever else --load_checkpoint takes.
# A config.json in the folder, or beside the file, describes the model; without one it is built as the released one.
export checkpoint_path="${checkpoint_path:-example/vae}"
# The image or video to tokenize.
export input_path="${input_path:-example/video.mp4}"
# Where the results go; made if need be.
export output_folder="${output_folder:-outputs/vae}"
# -------------------------------------------------------------------------------------------------

exec bash scripts/run_inference.sh vae "$@"
