import gc

from hymba_train.callbacks.garbage import CollectGarbage


def test_collections_come_at_the_interval_alone(loop_of):
    collected = []
    note = lambda phase, info: collected.append(phase)  # noqa: E731
    callback, loop = CollectGarbage(interval=3), loop_of()
    callback.on_train_start(loop)
    try:
        assert not gc.isenabled()
        gc.callbacks.append(note)
        for step in range(1, 7):
            loop.state.step = step
            callback.on_step_end(loop, None)
            assert len(collected) == 2 * (step // 3)
        callback.on_rewind(loop)
        assert len(collected) == 2 * 3
    finally:
        gc.callbacks.remove(note)
        callback.close()
    assert gc.isenabled()
