"""Web application for trained models: `ddpm-hf app`, and the Spaces that `ddpm-hf push` creates.

    served_models     the models, and the limits that follow from them
    requests, uploads values and pictures of visitors, checked on the server
    drawing, comparison, editing, inspection, nearest_images
                      the work: generators that end within a step when they are closed
    films, result_html
                      what the browser gets: small PNG pictures, which it enlarges
    *_tab, page       the page; `endpoints` has the functions for gradio_client
    server            start of the server

The modules of the work import no gradio.
"""
