"""TensorRT engines, for this device or ahead of time: which ones a bundle needs (`work_list`), for
which shapes (`profiles`), and how they are built (`build`), each in its own process (`worker`)."""
