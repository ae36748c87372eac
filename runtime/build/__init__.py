"""Builds TensorRT engines, for this device or for other machines: the list of engines that a bundle
needs (`work_list`), their shapes (`profiles`), and the build (`build`), which runs a process per
engine (`run_worker`, `worker`)."""
