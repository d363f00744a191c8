"""Replays the golden vectors of an artifact folder on this device's runtime.

    python verify.py [FOLDER] [--no-hash]          compares
    python verify.py [FOLDER] --image PHOTO.png    runs the model on one image, prepared as the manifest says
    python verify.py [FOLDER] --bench              times calls of the model on this device

Needs numpy and the artifact's runtime, nothing else; --image needs Pillow too, unless it is given a .npy array
(uint8 [H, W, C]). This file is shipped as `verify.py` in every artifact folder, for a device without edgeqat.
`edgeqat verify` runs the package's own copy, never code from the folder.

Exit codes: 0 every integer as expected; 2 a file is missing or does not match its hash; 3 the runtime computes
other integers than the reference; 4 the runtime is not installed.
"""
