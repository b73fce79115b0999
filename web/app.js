/** The page: a song from a file, or live sound; everything is computed in worker.js. */
import { GAINS, Player, clock } from "./player.js";
import { restore16, sampleRate, wavChannels } from "./wav.js";

const MOST_BYTES = 2 ** 30; // of a file, and of what is decoded of it
const MOST_CHANNELS = 8;
const SLIDERS = ["mask_sharpness", "noise_gate", "eval_mask_threshold"];
// From dark to bright, in steps that look alike, as on the listening page.
const HEAT = [[4, 5, 20], [70, 22, 95], [165, 45, 95], [240, 110, 50], [252, 235, 160]];
const byId = id => document.getElementById(id);
const canvases = [...document.querySelectorAll("canvas")];
const worker = startWorker();

let settings = null; // of the mask, as the sliders say; null: as the network's file says
let song = null; // { file, turn, asOf, name, rate, nChannels, nSamples, pieces }
let player = null;
export let live = null; // { context, stream, source, nChannels, name, port, node }
let liveWorker = null; // its own, so that a song that is separated meanwhile makes no block late
let opened = 0; // counts the files: what belongs to an earlier one is dropped
const requests = new Map(); // pieces that the worker was asked for

// --- A song ------------------------------------------------------------------------------------

class UserError extends Error {}

/** Decode a file at its own rate. */
async function decode(file) {
  if (file.size > MOST_BYTES) throw new UserError("is larger than 1 GB");
  const buffer = await file.arrayBuffer().catch(() => {
    throw new UserError("cannot be read any more (choose it again)");
  });
  const bytes = new Uint8Array(buffer), rate = sampleRate(bytes) ?? 44100;
  refuseChannels(wavChannels(bytes)); // not every browser decodes so many
  let audio;
  try {
    audio = await new OfflineAudioContext(1, 1, rate).decodeAudioData(buffer);
  } catch {
    throw new UserError("cannot be decoded by this browser (try wav, mp3, m4a or flac)");
  }
  refuseChannels(audio.numberOfChannels);
  if (4 * audio.length * audio.numberOfChannels > MOST_BYTES)
    throw new UserError("is too long: decoded, it takes more than 1 GB");
  return audio;
}

function refuseChannels(n) {
  if (n > MOST_CHANNELS)
    throw new UserError(`has ${n} channels; at most ${MOST_CHANNELS} can be separated here`);
}

/** Separate a file; it plays from `at` [s]. */
async function open(file, at = 0) {
  const mine = ++opened;
  say(`${file.name}: decoding …`);
  try {
    const audio = await decode(file), { sampleRate: rate, length, numberOfChannels } = audio;
    const wav = Array.from({ length: numberOfChannels }, (_, c) => audio.getChannelData(c).slice());
    if (!wav.some(channel => channel.some(x => x !== 0))) throw new UserError("holds no sound at all");
    restore16(wav);
    const facts = { file, turn: mine, name: file.name, rate, nSamples: length, nChannels: wav.length };
    if (mine === opened) begin(facts, wav, at);
  } catch (error) {
    const reason = error instanceof UserError ? error.message : "does not fit this device's memory";
    if (mine !== opened) return;
    say(`${file.name} ${reason}.`, true);
    if (song) song.asOf = opened; // it is still the one that is open
  }
}

function begin(description, wav, at) {
  player?.close();
  requests.clear();
  song = { ...description, asOf: description.turn, pieces: new Map() };
  for (const canvas of canvases) canvas.width = 0;
  byId("song").hidden = false;
  answers.progress({ share: 0 });
  const { turn, rate, nSamples, name } = song, seconds = nSamples / rate;
  song.pieceSamples = Math.ceil(rate / 2); // short, so that the first is soon there
  const buffers = wav.map(channel => channel.buffer);
  const network = byId("network").value;
  worker.postMessage({ type: "open", turn, name: network, wav, rate, changed: settings }, buffers);
  const pieceSeconds = song.pieceSamples / rate;
  player = new Player({ rate, seconds, shownSeconds: seconds, pieceSeconds, piece });
  player.goTo(at);
  mix();
  say(`${name}: ${clock(seconds)}, ${rate / 1000} kHz, ${wav.length === 1 ? "mono" : wav.length === 2 ? "stereo" : `${wav.length} channels`}`);
}

/** Promise half a second of vocals and accompaniment with the present settings. */
function piece(number) {
  const { pieces, rate, nChannels, pieceSamples: n } = song;
  if (!pieces.has(number)) {
    const id = `${opened} ${number} ${Math.random()}`;
    pieces.set(number, new Promise(resolve => {
      requests.set(id, tracks => resolve(tracks.map(wav => toBuffer(wav, nChannels, rate))));
    }));
    worker.postMessage({ type: "piece", id, start: number * n, n });
    if (pieces.size > 8) pieces.delete(pieces.keys().next().value);
  }
  return pieces.get(number);
}

function toBuffer(wav, nChannels, rate) {
  const buffer = new AudioBuffer({ numberOfChannels: nChannels, length: wav[0].length, sampleRate: rate });
  wav.forEach((channel, c) => buffer.copyToChannel(channel, c));
  return buffer;
}

// --- What the worker says ------------------------------------------------------------------------

const answers = {
  facts({ name, facts, provider }) {
    if (name !== byId("network").value) return;
    settings ??= facts.mask_settings;
    const where = provider === "webgpu" ? "on the GPU" : "on one core";
    byId("licence").textContent = `The network, ${where}: ${facts.licence || "no licence told"}.`;
    showSettings();
  },
  progress({ share }) {
    byId("progress").value = share;
    byId("progress").hidden = share === 1;
    for (const name of ["vocals", "accompaniment"]) byId(`save-${name}`).disabled = share < 1;
  },
  piece({ id, tracks }) {
    requests.get(id)?.(tracks);
    requests.delete(id);
  },
  picture({ first, nColumns, rows, levels }) {
    levels.forEach((picture, i) => paint(canvases[i], picture, first, nColumns, rows));
  },
  stem({ name, blob }) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${song.name.replace(/\.\w+$/, "")} (${name}).wav`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    byId(`save-${name}`).disabled = false;
  },
  live: message => { if (message.id === turn) connect(message); },
  error({ text, isLive }) {
    if (isLive) stopLive();
    say(`This did not work: ${text}.`, true);
  },
};

function startWorker() {
  const started = new Worker("worker.js", { type: "module" });
  started.onmessage = ({ data }) => {
    if (data.turn === undefined || data.turn === song.turn) answers[data.type](data);
  };
  started.onerror = () => say("The page's second thread did not start: a newer browser is needed.", true);
  return started;
}

function paint(canvas, picture, first, nColumns, rows) {
  if (canvas.width !== nColumns) Object.assign(canvas, { width: nColumns, height: rows });
  const n = picture.length / rows, image = new ImageData(n, rows);
  for (let column = 0; column < n; column++)
    for (let row = 0; row < rows; row++)
      image.data.set(colour(picture[column * rows + row]), 4 * ((rows - 1 - row) * n + column));
  canvas.getContext("2d").putImageData(image, first, 0);
}

function colour(level) {
  const place = (level / 255) * (HEAT.length - 1), i = Math.min(HEAT.length - 2, Math.floor(place));
  return [...HEAT[i].map((c, k) => c + (HEAT[i + 1][k] - c) * (place - i)), 255];
}

function say(text, isWrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", isWrong);
}

// --- Settings ------------------------------------------------------------------------------------

function showSettings() {
  byId("mask_at_eval").checked = settings.mask_at_eval;
  for (const name of SLIDERS) {
    byId(name).value = settings[name];
    byId(name).parentElement.querySelector("output").textContent = settings[name].toFixed(2);
  }
}

/** Take the sliders; what plays is rendered again, the network does not run again. */
function adjust() {
  if (!settings) return; // the network is on its way, and says where the others begin
  settings = { mask_at_eval: byId("mask_at_eval").checked };
  for (const name of SLIDERS) settings[name] = +byId(name).value;
  showSettings();
  for (const each of [worker, liveWorker]) each?.postMessage({ type: "adjust", changed: settings });
  song?.pieces.clear();
  player?.refresh();
}

/** The fader: -1 is the band alone, 0 everything, 1 the voice alone. */
function mix() {
  const place = +byId("fader").value, gains = [Math.min(1, 1 + place), Math.min(1, 1 - place)];
  player?.mix(gains);
  live?.node?.port.postMessage({ gains });
}

for (const name of [...SLIDERS, "mask_at_eval"]) byId(name).oninput = adjust;
const radios = document.querySelectorAll("input[name=track]");
byId("fader").oninput = () => {
  for (const radio of radios) radio.checked = false; // so that each can be chosen again
  player?.choose();
  mix();
};
for (const radio of radios)
  radio.addEventListener("change", () => {
    const [voice, backing] = GAINS[radio.value];
    byId("fader").value = voice - backing;
    mix();
  });
byId("network").onchange = () => {
  worker.postMessage({ type: "load", name: byId("network").value });
  if (song?.asOf === opened) open(song.file, player.position());
};
byId("network").onchange();
for (const name of ["vocals", "accompaniment"])
  byId(`save-${name}`).onclick = () => {
    byId(`save-${name}`).disabled = true;
    worker.postMessage({ type: "stem", name, isVocals: name === "vocals" });
  };

byId("file").onchange = ({ target }) => {
  if (target.files[0]) open(target.files[0]);
  target.value = ""; // the same file may be chosen again
  target.blur(); // Space plays
};
document.ondragover = event => { event.preventDefault(); byId("drop").classList.add("over"); };
document.ondragleave = () => byId("drop").classList.remove("over");
document.ondrop = event => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
};

// --- Live ----------------------------------------------------------------------------------------

const NO_CHANGES = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };

let turn = 0; // counts starts and stops: what belongs to an earlier one is dropped

async function startLive(capture) {
  stopLive();
  const mine = turn;
  let stream;
  try {
    stream = await capture();
    if (mine !== turn) return stop(stream);
    if (!stream.getAudioTracks().length) throw new UserError("That tab was shared without its sound.");
    await listen(stream);
  } catch (error) {
    if (stream) stop(stream);
    if (mine !== turn) return;
    stopLive();
    const refused = "There is no sound to listen to: it was not allowed, or there is no device.";
    byId("live-status").textContent = error instanceof UserError ? error.message : refused;
  }
}

/** Separate a stream as it comes. */
export async function listen(stream) {
  const id = turn;
  const context = new AudioContext({ latencyHint: "interactive" });
  const source = context.createMediaStreamSource(stream);
  const nChannels = Math.min(2, stream.getAudioTracks()[0].getSettings().channelCount ?? 1);
  const name = byId("network").value, rate = context.sampleRate;
  const { port1, port2: port } = new MessageChannel();
  live = { context, stream, source, nChannels, name, port };
  stream.getAudioTracks()[0].onended = stopLive; // the browser's own button, or a plug
  byId("live-status").textContent = "Getting ready …";
  byId("stop").hidden = false;
  await context.audioWorklet.addModule("live-processor.js");
  if (id !== turn) return;
  liveWorker ??= startWorker();
  liveWorker.postMessage({ type: "live", id, name, rate, nChannels, changed: settings, port: port1 }, [port1]);
}

function connect({ delay }) {
  const { context, source, nChannels, name, port } = live, processorOptions = { nChannels, delay };
  live.node = new AudioWorkletNode(context, "live-processor", {
    processorOptions, outputChannelCount: [nChannels],
    channelCount: nChannels, channelCountMode: "explicit", // the browser mixes others
  });
  live.node.port.postMessage({ worker: port }, [port]);
  const milliseconds = Math.round((1000 * delay) / context.sampleRate);
  const show = nLate => {
    const lateMs = Math.ceil((128_000 * nLate) / context.sampleRate);
    byId("live-status").textContent =
      `${milliseconds} ms behind, and what your device adds. Late for ${lateMs} ms.` +
      (lateMs > 200 && name === "model" ? " Try the small network." : "");
  };
  live.node.port.onmessage = ({ data }) => show(data.nLate);
  show(0);
  mix();
  source.connect(live.node).connect(context.destination);
}

function stop(stream) {
  for (const track of stream.getTracks()) track.stop();
}

function stopLive() {
  turn++;
  if (!live) return;
  stop(live.stream);
  live.node?.port.postMessage({ stop: true });
  live.context.close();
  live = null;
  byId("stop").hidden = true;
  byId("live-status").textContent = "";
}

byId("microphone").onclick = () =>
  startLive(() => navigator.mediaDevices.getUserMedia({ audio: NO_CHANGES }));
byId("tab").onclick = () => startLive(() => navigator.mediaDevices.getDisplayMedia({
  audio: { ...NO_CHANGES, suppressLocalAudioPlayback: true }, video: true,
}));
byId("stop").onclick = stopLive;
