# What every pipeline needs: the parts of this project, mmdet as the home of all names.
default_scope = 'mmdet'
custom_imports = dict(imports=['projects.instance_segment_anything'], allow_failed_imports=False)
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
log_level = 'INFO'
