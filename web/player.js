/**
 * The player of the listening page and of the browser's separator: two tracks, vocals and
 * accompaniment, that play as one; buttons, slider, pictures and keys. It comes in pieces of
 * `pieceSeconds`, of which `piece(number)` promises two AudioBuffers.
 */
export const GAINS = { mixture: [1, 1], vocals: [1, 0], accompaniment: [0, 1] };
const byId = id => document.getElementById(id);
const sleep = ms => new Promise(resolve => setTimeout(resolve, ms));

export function clock(seconds) {
  return Math.floor(seconds / 60) + ":" + String(Math.floor(seconds % 60)).padStart(2, "0");
}

export class Player {
  constructor({ rate, seconds, shownSeconds, pieceSeconds, piece }) {
    Object.assign(this, { rate, seconds, shownSeconds, pieceSeconds, piece });
    this.radios = [...document.querySelectorAll("input[name=track]")];
    this.offset = 0; // where playing starts or has started [s]
    this.began = null; // the context's time at which second 0 was, or would have been
    this.sources = new Set();
    this.turn = 0; // counts starts and stops
    this.isPlaying = false;
    this.levels = [1, 1];
    this.#listen();
    byId("play").disabled = false;
    byId("seek").max = seconds;
    this.choose();
    this.show();
  }

  position() {
    if (!this.isPlaying || this.began === null) return this.offset;
    const heard = this.context.currentTime - this.began - (this.context.outputLatency || 0);
    return Math.min(this.seconds, Math.max(this.offset, heard));
  }

  start() {
    if (!this.context) this.#open();
    this.context.resume();
    if (this.offset >= this.seconds) this.offset = 0;
    this.isPlaying = true;
    this.began = null;
    this.fades = this.gains.map(gain => {
      const fade = this.context.createGain();
      fade.connect(gain);
      return fade;
    });
    this.#play(++this.turn);
    this.#follow();
  }

  #open() {
    if (navigator.audioSession) navigator.audioSession.type = "playback"; // heard on a mute phone
    this.context = new AudioContext({ sampleRate: this.rate }); // nothing is resampled
    this.gains = this.levels.map(level => {
      const gain = this.context.createGain();
      gain.gain.value = level;
      gain.connect(this.context.destination);
      return gain;
    });
  }

  /** Schedule piece after piece, while this turn lasts; where one is late, all wait for it. */
  async #play(turn) {
    let number = Math.floor(this.offset / this.pieceSeconds);
    for (; number * this.pieceSeconds < this.seconds; number++) {
      const buffers = await this.piece(number);
      if (turn !== this.turn) return;
      const now = this.context.currentTime, second = number * this.pieceSeconds;
      if (this.began === null) this.#fadeIn(now);
      const skipped = Math.max(0, this.offset - second);
      if (this.began + second + skipped < now) 
        this.began = this.#onSample(now - second - skipped + 0.05);
      buffers.forEach((buffer, i) => this.#schedule(buffer, i, second, skipped));
      while (turn === this.turn && this.context.currentTime < this.began + second) await sleep(50);
      if (turn !== this.turn) return;
    }
  }

  /** 10 ms, so that nothing clicks. */
  #fadeIn(now) {
    this.began = this.#onSample(now - this.offset);
    for (const { gain } of this.fades) {
      gain.setValueAtTime(0, now);
      gain.linearRampToValueAtTime(1, now + 0.01);
    }
  }

  /** Move a time [s] to the nearest sample, so that pieces follow each other without a seam. */
  #onSample(time) {
    return Math.round(time * this.rate) / this.rate;
  }

  #schedule(buffer, track, second, skipped) {
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.fades[track]);
    source.start(this.began + second + skipped, skipped);
    source.onended = () => this.sources.delete(source);
    this.sources.add(source);
  }

  stop() {
    this.offset = this.position();
    this.isPlaying = false;
    this.turn++;
    for (const { gain } of this.fades ?? []) gain.setTargetAtTime(0, this.context.currentTime, 0.003);
    for (const source of this.sources) source.stop(this.context.currentTime + 0.03);
    this.show();
  }

  /** Stop for good: another song is about to be opened. */
  close() {
    if (this.isPlaying) this.stop();
    this.context?.close();
    byId("play").disabled = true;
  }

  toggle() {
    if (byId("play").disabled) return;
    if (this.isPlaying) this.stop();
    else this.start();
  }

  goTo(seconds) {
    const wasPlaying = this.isPlaying;
    if (wasPlaying) this.stop();
    this.offset = Math.min(this.seconds, Math.max(0, seconds));
    if (wasPlaying) this.start();
    this.show();
  }

  /** Take what is played from `piece` again, as its sound has changed. */
  async refresh() {
    if (!this.isPlaying) return;
    const { turn } = this;
    await this.piece(Math.floor(this.position() / this.pieceSeconds));
    if (turn === this.turn) this.goTo(this.position());
  }

  /** Set the gains of vocals and accompaniment, softly. */
  mix(levels) {
    this.levels = levels;
    this.gains?.forEach(({ gain }, i) =>
      gain.setTargetAtTime(levels[i], this.context.currentTime, 0.01));
  }

  choose() {
    const track = this.radios.find(radio => radio.checked)?.value;
    for (const figure of document.querySelectorAll("figure"))
      figure.classList.toggle("heard", figure.dataset.track === track);
    if (track) this.mix(GAINS[track]);
  }

  show() {
    const now = this.position(), text = clock(now) + " / " + clock(this.seconds);
    byId("playhead").style.left = (100 * now) / this.shownSeconds + "%";
    byId("seek").value = now;
    byId("play").classList.toggle("playing", this.isPlaying);
    if (byId("time").textContent !== text) {
      byId("time").textContent = text;
      byId("seek").setAttribute("aria-valuetext", clock(now) + " of " + clock(this.seconds));
    }
    byId("play").setAttribute("aria-label", this.isPlaying ? "Pause" : "Play");
  }

  #follow() {
    if (!this.isPlaying) return;
    if (this.position() >= this.seconds) this.stop();
    this.show();
    requestAnimationFrame(() => this.#follow());
  }

  #listen() {
    byId("play").onclick = () => this.toggle();
    byId("seek").oninput = () => this.goTo(+byId("seek").value);
    for (const radio of this.radios) radio.onchange = () => this.choose();
    document.onkeydown = event => this.#key(event);
    this.#drag(byId("pictures"));
  }

  /** A tap or click seeks; so does a drag, once it is one: a finger may only want to scroll. */
  #drag(pictures) {
    let from = null, isDrag = false;
    const point = event => {
      const box = pictures.getBoundingClientRect();
      this.goTo(((event.clientX - box.left) / box.width) * this.shownSeconds);
    };
    pictures.onpointerdown = event => { from = event.clientX; isDrag = false; };
    pictures.onpointermove = event => {
      if (from === null) return;
      if (!isDrag && Math.abs(event.clientX - from) < 8) return;
      if (!isDrag) pictures.setPointerCapture(event.pointerId);
      isDrag = true;
      point(event);
    };
    pictures.onpointerup = pictures.onpointercancel = () => { from = null; };
    pictures.onclick = event => { if (!isDrag) point(event); };
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { target } = event, { type } = target, step = { ArrowLeft: -5, ArrowRight: 5 }[event.key];
    if (type === "select-one") return;
    const isOwn = type === "range" && target.id !== "seek"; // other sliders keep their keys
    if (event.key === " " && !["button", "submit", "checkbox", "file"].includes(type)) this.toggle();
    else if (step && target.name !== "track" && !isOwn) this.goTo(this.position() + step);
    else if ("123".includes(event.key) && event.key) this.radios[event.key - 1].click();
    else return;
    event.preventDefault();
  }
}
