"""Web application for trained models: `ddpm-hf app`, and the Spaces that `ddpm-hf push` creates.

    served_models     the models, and what of them a page shows
    requests          requests of visitors, checked and bounded on the server
    drawing, ...      the work: generators that end within a step when they are closed
    films, pictures   what is sent to the browser: small PNG pictures, enlarged there
    *_tab, page       the page; `endpoints` has the functions for gradio_client
    server            start of the server

Only modules with `tab`, `page`, `server` or `endpoints` in their name, and the components, import
gradio.
"""
