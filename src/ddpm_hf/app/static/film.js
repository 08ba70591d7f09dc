// The film player. A sheet holds a film: one row per frame, in which x_t of every image is followed
// by the estimate of x_0 of every image. Images are enlarged by an integer factor.
const find = (name) => element.querySelector(name);
const texts = props.texts[navigator.language.slice(0, 2)] || props.texts.en;
const canvases = [find(".film-x0"), find(".film-xt")];
const [slider, play, output] = [find("input"), find(".film-play"), find("output")];
const GAP = 2, MAX_TILE = 192, CAPTION = 15, FRAME_MS = 60;
let film = null, sheet = null, final = null, timer = null, wasDone = true;

find(".film-empty").textContent = texts.empty;
canvases[0].nextElementSibling.textContent = texts.x_0;
canvases[1].nextElementSibling.textContent = texts.x_t;
canvases[0].setAttribute("aria-label", texts.x_0);
canvases[1].setAttribute("aria-label", texts.x_t);
slider.setAttribute("aria-label", texts.position);
find(".film-png").textContent = texts.save_png;
find(".film-gif").textContent = texts.save_gif;

function fill(text, values) {
  return text.replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

function drawGrid(canvas, half, index) {
  const isFinal = film.done && index === film.frames.length - 1 && final;
  const picture = isFinal ? final : sheet;
  const rows = isFinal ? 1 : film.frames.length, perRow = isFinal ? film.num_images : 2 * film.num_images;
  const w = picture.width / perRow, h = picture.height / rows;
  const columns = film.columns, lines = Math.ceil(film.num_images / columns);
  const ratio = window.devicePixelRatio || 1, gap = Math.round(GAP * ratio);
  const room = (canvas.parentElement.clientWidth * ratio - gap * (columns - 1)) / columns;
  const [width, height] = film.size;
  const wanted = Math.min(room, MAX_TILE * ratio * (film.num_images === 1 ? 2 : 1));
  const factor = wanted >= width ? Math.floor(wanted / width) : wanted / width;
  const [tw, th] = [Math.round(width * factor), Math.round(height * factor)];
  const caption = film.captions && tw / ratio >= 48 ? Math.round(CAPTION * ratio) : 0;
  canvas.width = columns * tw + (columns - 1) * gap;
  canvas.height = lines * (th + caption) + (lines - 1) * gap;
  canvas.style.width = canvas.width / ratio + "px";
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = tw < w;
  context.fillStyle = getComputedStyle(canvas).color;
  context.textAlign = "center";
  context.font = 11 * ratio + "px sans-serif";
  for (let i = 0; i < film.num_images; i++) {
    const x = (i % columns) * (tw + gap), y = Math.floor(i / columns) * (th + caption + gap);
    const column = isFinal ? i : i + half * film.num_images;
    const top = isFinal ? 0 : index * h;
    context.drawImage(picture, column * w, top, w, h, x, y, tw, th);
    if (caption) {
      context.fillText(film.captions[i], x + tw / 2, y + th + caption - 4 * ratio, tw);
    }
  }
}

function show(index) {
  if (!film || !sheet) return;
  drawGrid(canvases[0], 1, index);
  drawGrid(canvases[1], 0, index);
  const [step, t] = film.frames[index];
  const position = fill(texts.step_of, { step, total: film.total });
  output.textContent = position + ", " + fill(texts.noise_level, { t: Math.round(t) });
}

function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = "\u25B6\uFE0E";
  play.setAttribute("aria-label", texts.play);
}

function toggle() {
  if (timer) return stop();
  let index = Number(slider.value);
  index = index >= film.frames.length - 1 ? -1 : index;
  play.textContent = "\u275A\u275A";
  play.setAttribute("aria-label", texts.pause);
  timer = setInterval(() => {
    index += 1;
    slider.value = index;
    show(index);
    if (index >= film.frames.length - 1) stop();
  }, FRAME_MS);
}

function scrollToFilm() {
  const box = element.getBoundingClientRect();
  if (box.top > window.innerHeight * 0.6) element.scrollIntoView({ behavior: "smooth" });
}

function reveal() {
  const last = film.frames.length - 1;
  if (wasDone && !film.done) setTimeout(scrollToFilm);
  wasDone = film.done;
  find(".film-empty").hidden = true;
  find(".film-views").hidden = find(".film-bar").hidden = false;
  find(".film-foot").hidden = !film.done;
  slider.disabled = play.disabled = !film.done;
  [slider.max, slider.value] = film.done ? [last, last] : [film.total, film.frames[last][0]];
  element.querySelector(".film").dataset.done = film.done;
  show(last);
  if (!film.done) return;
  for (const canvas of canvases) canvas.title = texts.click_to_edit;
  find(".film-note").textContent = fill(texts.finished, { num: film.num_images, seconds: film.seconds });
  for (const kind of ["png", "gif"]) {
    const link = find(".film-" + kind);
    link.href = film[kind];
    link.download = film.name + "." + kind;
  }
}

function picture(url, then) {
  const image = new Image();
  image.onload = () => then(image);
  image.src = url;
}

function update() {
  const value = props.value;
  if (!value || !value.sheet) return;
  stop();
  picture(value.sheet, (loaded) => {
    const ready = (full) => {
      if (props.value !== value && JSON.stringify(props.value) !== JSON.stringify(value)) return;
      [film, sheet, final] = [value, loaded, full];
      reveal();
    };
    value.final ? picture(value.final, ready) : ready(null);
  });
}

function select(event) {
  if (!film || !film.done) return;
  const box = event.target.getBoundingClientRect(), columns = film.columns;
  const lines = Math.ceil(film.num_images / columns);
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const line = Math.floor(((event.clientY - box.top) / box.height) * lines);
  const index = line * columns + column;
  if (index < film.num_images) trigger("select", { index, value: null });
}

for (const canvas of canvases) canvas.addEventListener("click", select);
stop();
slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
play.addEventListener("click", toggle);
new ResizeObserver(() => show(film && film.done ? Number(slider.value) : film ? film.frames.length - 1 : 0)).observe(element);
watch("value", update);
update();
