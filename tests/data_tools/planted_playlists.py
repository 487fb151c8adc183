"""Playlists with planted clusters: which songs belong together is known, and popularity alone does not tell it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CLUSTERS, SONGS_EACH = 12, 25


def cluster_of(song: str) -> int:
    return (int(song) - 1000) // SONGS_EACH


def write_playlists(folder: Path, number: int = 1500, seed: int = 0) -> tuple[Path, Path]:
    """(train.txt with two lines of other data first, song_hash.txt); popularity within a cluster is Zipf's."""
    random = np.random.default_rng(seed)
    songs = np.arange(CLUSTERS * SONGS_EACH) + 1000
    popularity = 1 / np.arange(1, SONGS_EACH + 1)
    popularity /= popularity.sum()
    lines = [" ".join(map(str, songs)), " ".join("7" for _ in songs)]
    for _ in range(number):
        cluster = random.integers(CLUSTERS)
        own = songs[cluster * SONGS_EACH :][:SONGS_EACH]
        chosen = random.choice(own, size=random.integers(5, 12), replace=False, p=popularity)
        stray = random.random(len(chosen)) < 0.1
        chosen[stray] = random.choice(songs, size=stray.sum())
        lines.append(" ".join(map(str, chosen)))
    (folder / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = [f"{song} \t{'夜曲' if song % 2 else 'Song'} {song}\t歌手 {cluster_of(str(song))}" for song in songs]
    (folder / "song_hash.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder / "train.txt", folder / "song_hash.txt"
