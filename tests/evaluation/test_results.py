import math

from ser_mm.evaluation.results import format_mean, make_table


def test_means_have_a_deviation_if_values_differ():
    assert format_mean([0.5]) == '0.500'
    assert format_mean([1, 1], ',.0f') == '1'
    assert format_mean([1.0, 2.0, 3.0], '.1f') == '2.0 ± 1.0'
    assert format_mean([math.nan, 1.0]) == '-'


def test_a_table_is_aligned():
    assert make_table(['', 'top-1'], [['probe', 0.5], ['k-NN', '-']]).splitlines() == [
        '|       | top-1 |',
        '| ----- | ----: |',
        '| probe | 0.500 |',
        '| k-NN  |     - |',
    ]
