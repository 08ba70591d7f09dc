"""Web application for trained models: `ddpm-hf app`, and the Spaces that `ddpm-hf push` creates.

A click on Draw calls `run` in `draw_tab`: the values of `controls` become a `DrawRequest`,
`drawing` yields the steps of sampling, `films` makes a picture of them, and static/film.js shows
it.

    server, page      start of the server, and the page of all tabs
    *_tab             one tab each; `site` has what they share
    endpoints         the functions for gradio_client
    controls, picture_input, browser_components
                      groups of components
    served_models     the models, and the limits that follow from them
    requests, uploads values and pictures of visitors, checked on the server
    drawing, comparison, editing, inspection, nearest_images
                      the work: generators that end within a step when they are closed
    working           progress, time limit and threads of the work
    films, result_html, snippets
                      what the browser gets: small PNG pictures, which it enlarges, and code
    page_texts, translations, request_errors, reported_errors
                      texts and errors in the language of the visitor

The modules of the work import no gradio.
"""
