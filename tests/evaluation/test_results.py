import json
import math

from ser_mm.evaluation.results import format_mean, make_table, write_results


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


def test_json_that_any_reader_takes(tmp_path):
    results = dict(r2=math.nan, blocks=[0.5, math.inf], path=tmp_path)
    write_results(tmp_path, 'found', results, 'text')

    def refuse(word):
        raise AssertionError(f'{word} is no JSON')

    found = json.loads((tmp_path / 'found.json').read_text(), parse_constant=refuse)
    assert found == dict(r2=None, blocks=[0.5, None], path=str(tmp_path))
