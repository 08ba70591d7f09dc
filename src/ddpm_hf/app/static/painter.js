// Shows a picture enlarged, and lets the visitor paint a mask over its pixels with a square brush.
const find = (name) => element.querySelector(name);
const texts = props.texts[navigator.language.slice(0, 2)] || props.texts.en;
const [canvas, brush, clear] = [find("canvas"), find("input"), find(".painter-clear")];
const MAX_SIDE = 336, MASK_COLOUR = "rgba(79, 70, 229, 0.72)";
let picture = null, mask = null, width = 0, height = 0, isPainting = false, erases = false;

find(".painter-empty").textContent = texts.no_picture;
find(".painter-tools span").textContent = texts.brush;
clear.textContent = texts.clear;
canvas.setAttribute("aria-label", texts.mask_label);

function show() {
  if (!picture) return;
  const room = Math.min(find(".painter-board").clientWidth || MAX_SIDE, MAX_SIDE);
  const ratio = window.devicePixelRatio || 1, longer = Math.max(width, height);
  const scale = longer <= room * ratio ? Math.floor((room * ratio) / longer) : (room * ratio) / longer;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = canvas.width / ratio + "px";
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = scale < 1;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.fillStyle = MASK_COLOUR;
  for (let i = 0; i < mask.length; i++) {
    if (!mask[i]) continue;
    const [x, y] = [i % width, Math.floor(i / width)];
    const [left, top] = [Math.round(x * scale), Math.round(y * scale)];
    context.fillRect(left, top, Math.round((x + 1) * scale) - left, Math.round((y + 1) * scale) - top);
  }
}

function pixelAt(event) {
  const box = canvas.getBoundingClientRect();
  return [
    Math.floor(((event.clientX - box.left) / box.width) * width),
    Math.floor(((event.clientY - box.top) / box.height) * height),
  ];
}

function paint(event) {
  const [x, y] = pixelAt(event), size = Number(brush.value), first = -Math.floor((size - 1) / 2);
  for (let i = first; i < first + size; i++) {
    for (let j = first; j < first + size; j++) {
      if (x + i >= 0 && x + i < width && y + j >= 0 && y + j < height) {
        mask[(y + j) * width + x + i] = erases ? 0 : 1;
      }
    }
  }
  show();
}

function publish() {
  props.value = { ...props.value, mask: mask.join("") };
}

function update() {
  const value = props.value;
  find(".painter-empty").hidden = !!(value && value.picture);
  find(".painter-board").hidden = !(value && value.picture);
  find(".painter-tools").hidden = !(value && value.picture && value.paint);
  if (!value || !value.picture) return;
  const image = new Image();
  image.onload = () => {
    [width, height] = value.size;
    const isSame = value.mask && value.mask.length === width * height;
    picture = image;
    mask = isSame ? Array.from(value.mask, Number) : new Array(width * height).fill(0);
    brush.max = Math.max(1, Math.round(width / 3));
    brush.value = Math.max(1, Math.round(width / 8));
    canvas.style.cursor = value.paint ? "crosshair" : "default";
    canvas.style.touchAction = value.paint ? "none" : "auto";
    element.querySelector(".painter").dataset.ready = true;
    show();
  };
  image.src = value.picture;
}

canvas.addEventListener("pointerdown", (event) => {
  if (!props.value.paint) return;
  canvas.setPointerCapture(event.pointerId);
  const [x, y] = pixelAt(event);
  [isPainting, erases] = [true, !!mask[y * width + x]];
  paint(event);
});
canvas.addEventListener("pointermove", (event) => { if (isPainting) paint(event); });
for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, () => {
    if (!isPainting) return;
    isPainting = false;
    publish();
  });
}
clear.addEventListener("click", () => { mask.fill(0); show(); publish(); });
new ResizeObserver(show).observe(element);
watch("value", update);
update();
