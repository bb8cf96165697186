"""Data sets of a run with cached features in place of images."""

import os

from cappa_tf.inference.feature_cache import FeatureCache


def check(features, model, train_data):
    """Prepares a model for features, if they are wanted; reads no data.

    Args:
        features: The run's `FeatureSettings`.
        model: Built `Task`, its parts frozen.
        train_data: The training data, or its constructor.

    Raises:
        ValueError: If model or data need images; names the binding.
    """
    if features.features is None:
        return
    model.use_features()
    check_augmentation = getattr(train_data, "check_unaugmented", None)
    if check_augmentation is not None:
        check_augmentation()


def replace_images(features, data, model, workdir, hosts):
    """Opens the caches of a run's data sets, and computes what they lack.

    Must be called when the encoder has its weights.

    Args:
        features: The run's `FeatureSettings`.
        data: Dict of the data sets by name; a value may be None.
        model: Built `Task`.
        workdir: The run's folder.
        hosts: The run's `Hosts`.

    Returns:
        (dict of the data sets, with features in place of images if they are
        wanted; log lines about the caches).

    Raises:
        ValueError: If a data set cannot have features, or as
            `FeatureCache.open_or_compute`.
    """
    if features.features is None:
        return data, []
    done, lines = {}, []
    for name, dataset in data.items():
        # The same split may be there twice.
        if dataset is None or id(dataset) in done:
            continue
        if not hasattr(dataset, "with_features"):
            raise ValueError(
                "FEATURES='cached' needs data sets such as CaptionDataset. "
                f"Received: {name}={dataset!r}"
            )
        dataset.check_unaugmented()
        cache = FeatureCache.open_or_compute(
            model.parts["vision_encoder"],
            dataset,
            model.feature_kind,
            folder=features.cache_folder or os.path.join(workdir, "features"),
            dtype=features.dtype,
            batch_size=features.batch_size,
            hosts=hosts,
        )
        done[id(dataset)] = dataset.with_features(cache)
        lines.append(cache.origin)
    return {name: done.get(id(x)) for name, x in data.items()}, lines
