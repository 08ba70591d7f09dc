"""Diffusion: scheduler, pipeline and checkpoint format.

All files of this folder are saved with the weights. They import only stock diffusers and its
dependencies.

betas          schedules
coefficients   coefficients, coefficient_tables
q(x_t | x_0)   forward_process, with the posterior q(x_prev | x_t, x_0)
p(x_prev|x_t)  reverse_process: `step` with eta, DDIM inversion, terms of the variational bound
timesteps      timestep_spacings, inference_timesteps (`set_timesteps`)
scheduler      scheduling; configuration: scheduler_config, config_checks, config_extension
sampling       sampling_loop, callbacks; guidance: conditioning, likelihood_guidance
editing        inpainting with krylov, image_to_image, inversion with interpolation
images         image_format, image_processor
pipeline       pipeline on pipeline_editing, pipeline_inversion, denoising_pipeline
checkpoints    portable_pipeline, portable_checkpoint, checkpoint_limits, atomic_files
"""
