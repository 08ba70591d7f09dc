// Draw the faces: one JSON object per line, with the seed, its factors and the pixels in base64.
//
//   npm install @dicebear/core@9.4.3 @dicebear/pixel-art@9.4.3 @resvg/resvg-js@2.6.2
//   node make_faces.mjs | python make_parquet.py check
import * as pixelArt from '@dicebear/pixel-art';
import { createAvatar } from '@dicebear/core';
import { Resvg } from '@resvg/resvg-js';

const NUM_FACES = 6000;
const AT_16 = { fitTo: { mode: 'width', value: 16 }, font: { loadSystemFonts: false } };

for (let i = 0; i < NUM_FACES; i++) {
  const avatar = createAvatar(pixelArt, { seed: `face-${i}`, backgroundColor: ['ffffff'] });
  const image = new Resvg(avatar.toString(), AT_16).render();
  const factors = avatar.toJson().extra;
  const pixels = image.pixels.toString('base64'); // RGBA, opaque
  process.stdout.write(`${JSON.stringify({ seed: i, factors, pixels })}\n`);
}
