"""What a table of classifiers says of each.

Expected calibration error: the mean over ten bins of the highest posterior, weighted by their images, of the difference
between posterior and accuracy.
"""


def measures(probability, truth):
    """Return accuracy, mean negative log-posterior of the truth, and expected calibration error."""
    highest, prediction = probability.max(1)
    right = (prediction == truth).double()
    bins = (highest * 10).long().clamp(max=9)
    gaps = [abs(float((highest[bins == b] - right[bins == b]).sum())) for b in range(10)]
    return {
        "accuracy": float(right.mean()),
        "negative log-posterior": float(-probability.gather(1, truth[:, None]).clamp(min=1e-12).log().mean()),
        "calibration error": sum(gaps) / len(truth),
    }
