"""Spoken sentences with known text, made by eSpeak NG: for measures of speech recognisers.

    clips = speech(n=20, seed=0)          # .samples at 16 kHz, .text, .voice

The library comes in the wheel `espeakng-loader` (extra `audio`). Its voice is synthetic: error rates on it
are those of a machine's English, not of people's.
"""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actlas.core.errors import FailureError, InputError

RATE = 16_000
VOICES = ("en-us", "en-gb-x-rp")
_WHO = ("the teacher", "my neighbour", "a young doctor", "the old captain", "her brother", "our driver")
_DID = ("bought", "lost", "painted", "carried", "described", "forgot", "repaired", "borrowed")
_WHAT = ("a green umbrella", "three wooden chairs", "the morning paper", "a heavy box of apples",
         "her guitar", "the long letter", "two bottles of milk", "a map of the city")  # fmt: skip
_WHERE = ("in the garden", "near the station", "on the way to work", "at the market", "behind the school",
          "before the meeting", "after a quiet dinner", "during the storm")  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """One spoken sentence.

    Attributes:
        text: what is said.
        voice: of whom.
        samples: float32 at 16 kHz, between -1 and 1.
    """

    text: str
    voice: str
    samples: NDArray[np.float32] = field(repr=False)


def sentences(n: int, seed: int = 0) -> list[str]:
    """Return different plain sentences."""
    most = len(_WHO) * len(_DID) * len(_WHAT) * len(_WHERE)
    if not 1 <= n <= most:
        raise InputError(f"there are 1 to {most} sentences; asked for {n}")
    rng, found = random.Random(seed), dict[str, None]()
    while len(found) < n:
        said = f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)} {rng.choice(_WHERE)}"
        found[said[0].upper() + said[1:] + "."] = None
    return list(found)


def speech(n: int = 20, *, seed: int = 0) -> list[Clip]:
    """Return `n` spoken sentences, voices in turn.

    Raises:
        InputError: the package `espeakng-loader` is not installed.
        FailureError: the synthesiser does not start.
    """
    synthesiser = _Synthesiser()
    made = []
    for i, text in enumerate(sentences(n, seed)):
        voice = VOICES[i % len(VOICES)]
        made.append(Clip(text, voice, synthesiser.say(text, voice)))
    return made


class _Synthesiser:
    """eSpeak NG through its C interface: speech goes to a callback, not to a loudspeaker."""

    _library: Any = None
    _rate = 0

    def __init__(self) -> None:
        if _Synthesiser._library is not None:
            return
        try:
            import espeakng_loader
        except ImportError as missing:
            raise InputError(
                "speaking takes the package espeakng-loader: pip install 'actlas[audio]'"
            ) from missing
        library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        where = str(espeakng_loader.get_data_path()).encode()
        retrieval = 1
        rate = library.espeak_Initialize(retrieval, 0, ctypes.c_char_p(where), 0)
        if rate <= 0:
            raise FailureError(f"eSpeak NG did not start (it returned {rate})")
        _Synthesiser._library, _Synthesiser._rate = library, rate

    def say(self, text: str, voice: str) -> NDArray[np.float32]:
        """Return one sentence at 16 kHz."""
        library, parts = _Synthesiser._library, list[NDArray[np.int16]]()
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

        def take(wave: Any, n: int, events: Any) -> int:
            if n > 0:
                parts.append(np.ctypeslib.as_array(wave, (n,)).copy())
            return 0

        callback = kind(take)
        library.espeak_SetSynthCallback(callback)
        if library.espeak_SetVoiceByName(ctypes.c_char_p(voice.encode())):
            raise FailureError(f"eSpeak NG has no voice {voice!r}")
        data = text.encode() + b"\0"
        utf8 = 1
        library.espeak_Synth(data, len(data), 0, 1, 0, utf8, None, None)
        library.espeak_Synchronize()
        if not parts:
            raise FailureError(f"eSpeak NG said nothing for {text!r}")
        wave = np.concatenate(parts).astype(np.float32) / 32768
        from scipy.signal import resample_poly

        shared = np.gcd(RATE, _Synthesiser._rate)
        return np.asarray(resample_poly(wave, RATE // shared, _Synthesiser._rate // shared), np.float32)
