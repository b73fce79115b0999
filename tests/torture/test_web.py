"""The browser's page: masks and vocals are Python's, files add up, live sound keeps its delay."""

import base64
import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audio
import model
from hparams import hparams
from separation import Separator
from tools import export

ROOT = Path(__file__).parents[2]
WEB, ORT = ROOT / "web", ROOT / "web/node_modules/onnxruntime-web/dist"
FFT = WEB / "node_modules/@echogarden/kissfft-wasm"
CHECKPOINT = ROOT / "pretrained/resnet18_small.pth"
CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-sync", "--disable-background-networking", "--disable-component-update"),
    *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),
    "--autoplay-policy=no-user-gesture-required",
]
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(
        not (shutil.which("node") and ORT.is_dir()), reason="needs node, and make site to have run"
    ),
]
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder that make site writes, with the small network in both places."""
    site = tmp_path_factory.mktemp("web") / "site"
    (site / "ort").mkdir(parents=True)
    for path in (path for path in WEB.iterdir() if path.suffix in (".html", ".css", ".js", ".svg")):
        shutil.copy(path, site)
    for path in FFT.glob("kissfft.*"):
        shutil.copy(path, site / "ort")
    for pattern in ("ort.w*.min.mjs", "ort-wasm-simd-threaded.*"):
        for path in ORT.glob(pattern):
            (site / "ort" / path.name).symlink_to(path)
    (site / "recorder.js").write_text(RECORDER)
    export.main([str(CHECKPOINT), str(site / "model.onnx")])
    shutil.copy(site / "model.onnx", site / "model_small.onnx")
    return site


@pytest.fixture(scope="module")
def separator() -> Separator:
    return Separator.load(CHECKPOINT, settings={"precision": "float32"})


@pytest.fixture
def page(site):
    with browsing(site) as page:
        yield page


@contextlib.contextmanager
def browsing(site: Path, *flags: str):
    """The page in a browser; it asks for nothing but its own files."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    requests = []
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_api.sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.context.on("request", lambda request: requests.append(request.url))
        origin = f"http://127.0.0.1:{server.server_port}/"
        page.goto(origin)
        until(page, "document.getElementById('licence').textContent")
        yield page
        browser.close()
        server.shutdown()
    assert any(url.endswith("model.onnx") for url in requests)
    assert all(url.startswith((origin, f"blob:{origin}")) for url in requests)


def until(page, expression: str) -> None:
    """Wait for something on the page; playwright's own way is against its security policy."""
    end = time.monotonic() + 120
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression}: {page.inner_text('#status')}"
        page.wait_for_timeout(50)


def in_node(model: Path, wav: np.ndarray, rate: int, folder: Path, *mode: str):
    """Separate (n_channels, n_samples) as the page does; vocals, and what was measured."""
    wav.astype("f4").tofile(folder / "in.f32")
    command = ["node", "tests/torture/separate.mjs", model, folder / "in.f32", rate, len(wav)]
    command = [*map(str, command), str(folder / "out"), *mode]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    vocals = np.fromfile(folder / "out.vocals", np.float32).reshape(len(wav), -1)
    return vocals, json.loads(run.stdout)


def excerpt(data_folder: Path, name: str, seconds: float = 8) -> np.ndarray:
    """From the middle of a song that is given in stems, (2, n_samples) at 44.1 kHz."""
    start, stems = 44100 * 30, (data_folder / "dsd100" / name).glob("*.ogg")
    end = start + round(44100 * seconds)
    parts = [soundfile.read(path, start=start, stop=end, dtype="float32")[0] for path in stems]
    return np.ascontiguousarray(sum(parts).T)


def difference_db(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(np.square(one - other).sum() / np.square(other).sum() + 1e-20)


def test_masks_and_vocals_are_those_of_python(data_folder, tmp_path, site, separator):
    wav = excerpt(data_folder, "Caesium")
    odd = wav[:, :100_001]
    recordings = {name: (excerpt(data_folder, name), 44100) for name in ("Lithium", "Potassium")}
    recordings |= {"Caesium": (wav, 44100), "48 kHz": (odd, 48000), "soft": (odd[:1] / 1000, 44100)}
    recordings["five channels"] = np.concatenate([odd, odd[:, ::-1], odd[:1] / 2]), 22050
    recordings |= {"low rate": (odd[:, :30_000], 16000), "short": (odd[:, :300], 44100)}
    for name, (song, rate) in recordings.items():
        vocals, _ = in_node(site / "model.onnx", song, rate, tmp_path)
        expected = separator.song_mask(song, rate).numpy()  # (n_masks, n_bins, n_frames)
        mask = np.fromfile(tmp_path / "out.mask", np.uint8).reshape(len(expected), -1, 513) / 255
        off = np.abs(mask.swapaxes(1, 2) - expected)
        assert off.max() < 4e-3, name  # one of 256 levels, where rounding decides
        assert (off > 2e-3).mean() < 1e-3, name
        assert difference_db(vocals, separator.separate(song, rate)[0]) < -50, name


def test_live_sound_is_the_song_one_delay_later(data_folder, tmp_path, site):
    wav = excerpt(data_folder, "Lithium", 4)
    whole, _ = in_node(site / "model.onnx", wav, 44100, tmp_path)
    live, measured = in_node(site / "model.onnx", wav, 44100, tmp_path, "live")
    assert wav.shape[1] - live.shape[1] <= measured["delay"]
    assert difference_db(live, whole[:, : live.shape[1]]) < -100


def saved(page, name: str) -> tuple[np.ndarray, str]:
    with page.expect_download() as download:
        page.click(f"#save-{name}")
    path = download.value.path()
    return soundfile.read(path, dtype="int32")[0] >> 8, soundfile.info(path).subtype


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_song_plays_while_it_is_separated_and_its_stems_add_up(
    page, data_folder, tmp_path, subtype
):
    wav = excerpt(data_folder, "Caesium", 5)
    soundfile.write(tmp_path / "a song.wav", wav.T.clip(-1, 0.9999), 44100, subtype)
    page.set_input_files("#file", tmp_path / "a song.wav")
    page.click("#play")
    until(page, "+document.getElementById('seek').value > 0.2")
    until(page, "!document.getElementById('save-vocals').disabled")
    assert "44.1 kHz, stereo" in page.inner_text("#status")
    mixture = soundfile.read(tmp_path / "a song.wav", dtype="float64")[0] * 2**23
    (vocals, its_subtype), (accompaniment, _) = (
        saved(page, name) for name in ("vocals", "accompaniment")
    )
    assert its_subtype == ("PCM_16" if subtype == "PCM_16" else "PCM_24")
    np.testing.assert_array_equal(vocals + accompaniment, np.floor(mixture + 0.5))

    picture = "document.querySelectorAll('canvas')[2].toDataURL()"
    before = page.evaluate(picture)
    page.evaluate("""() => {
        const slider = document.getElementById('mask_sharpness');
        slider.value = 3;
        slider.oninput();
    }""")
    until(page, f"{picture} !== {json.dumps(before)}")
    assert np.square(saved(page, "vocals")[0] / 2**23).sum() < np.square(vocals / 2**23).sum()
    page.select_option("#network", "model_small")  # separates it anew
    until(page, "document.getElementById('save-vocals').disabled")
    until(page, "!document.getElementById('save-vocals').disabled")
    assert float(page.input_value("#seek")) > 0.2  # and goes on where it was


def test_what_is_wrong_with_a_file_is_one_sentence_and_the_page_goes_on(page, tmp_path):
    tone = 0.2 * np.sin(np.arange(44100) / 20)
    soundfile.write(tmp_path / "tone.flac", tone, 44100)
    soundfile.write(tmp_path / "silence.wav", 0 * tone, 44100)
    soundfile.write(tmp_path / "wide.wav", np.tile(tone[:, None], 32), 44100)
    (tmp_path / "text.mp3").write_text("no song")
    with (tmp_path / "huge.wav").open("wb") as file:
        file.truncate(2**30 + 1)
    faults = {
        "silence.wav": "holds no sound at all",
        "wide.wav": "has 32 channels",
        "text.mp3": "cannot be decoded",
        "huge.wav": "is larger than 1 GB",
    }
    page.context.route("**/model_small.onnx", lambda route: route.fulfill(status=404))
    page.select_option("#network", "model_small")
    until(page, "document.getElementById('status').textContent.includes('is not there')")
    page.context.unroute("**/model_small.onnx")
    for name, fault in faults.items():
        page.set_input_files("#file", tmp_path / name)
        until(page, "document.querySelector('#status.wrong')")
        assert fault in page.inner_text("#status"), name
        page.set_input_files("#file", tmp_path / "tone.flac")
        until(page, "document.getElementById('status').textContent.includes('tone.flac: 0:01')")
    until(page, "!document.getElementById('save-vocals').disabled")


def test_a_webm_is_decoded_at_the_rate_of_opus(page, tmp_path):
    av = pytest.importorskip("av")
    noise = 0.1 * np.random.default_rng(0).standard_normal((1, 480_000), np.float32)
    with av.open(str(tmp_path / "noise.webm"), "w") as file:
        stream = file.add_stream("libopus", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(noise, "flt", "mono")
        frame.sample_rate = 48000
        file.mux([*stream.encode(frame), *stream.encode(None)])
    page.set_input_files("#file", tmp_path / "noise.webm")
    until(page, "document.getElementById('status').textContent.includes('0:10, 48 kHz')")


def test_a_gpu_separates_alike(site, tmp_path):
    """Chromium's own, in software, which the page would not take; of a network that is no work."""
    hp = replace(hparams, width=2, stft_frames=9)
    curve_db = audio.weighting_curve_db(hp)
    model.save_checkpoint(tmp_path / "tiny.pth", model.build_model(hp), hp, curve_db=curve_db)
    shutil.copytree(site, tmp_path / "site", symlinks=True)
    export.main([str(tmp_path / "tiny.pth"), str(tmp_path / "site/model.onnx")])
    worker = tmp_path / "site/worker.js"
    worker.write_text(worker.read_text().replace(" || adapter.info.isFallbackAdapter", ""))
    wav = np.random.default_rng(0).normal(0, 0.1, (22050, 2))
    for name in ("first.wav", "noise.wav"):
        soundfile.write(tmp_path / name, wav, 44100)
    stems = []
    for where, flags in (("on one core", ()), ("on the GPU", SOFTWARE_GPU)):
        with browsing(tmp_path / "site", *flags) as page:
            assert where in page.inner_text("#licence")
            page.set_input_files("#file", tmp_path / "first.wav")
            until(page, "document.getElementById('progress').value > 0")  # a call is under way
            page.set_input_files("#file", tmp_path / "noise.wav")
            until(page, "!document.getElementById('save-vocals').disabled")
            stems.append(saved(page, "vocals")[0])
    assert np.square(stems[0] / 2**15).sum() > 1
    assert difference_db(stems[1] / 2**15, stems[0] / 2**15) < -50


def test_microphone_and_tab_are_listened_to(page):
    for name in ("microphone", "tab"):
        page.click(f"#{name}")
        until(page, "document.getElementById('live-status').textContent.includes('Getting ready')")
        page.click("#stop")  # its answer comes when another one is asked for
        page.click(f"#{name}")
        until(page, "document.getElementById('live-status').textContent.includes('ms behind')")
        page.click("#stop")
        assert page.inner_text("#live-status") == ""


RECORDER = """registerProcessor("recorder", class extends AudioWorkletProcessor {
    process(inputs) {
        this.port.postMessage(inputs.map(input => (input[0] ?? new Float32Array(128)).slice()));
        return true;
    }
})"""
LISTEN = """async ([samples, seconds]) => {
    const app = await import("/app.js"), context = new AudioContext({ sampleRate: 44100 });
    const sound = context.createBuffer(1, samples.length, 44100);
    sound.copyToChannel(Float32Array.from(samples), 0);
    const source = context.createBufferSource(), sink = context.createMediaStreamDestination();
    source.buffer = sound;
    sink.channelCount = 1;
    source.connect(sink);
    await app.listen(sink.stream);
    while (!app.live.node) await new Promise(resolve => setTimeout(resolve, 50));
    const { context: its, source: dry, node } = app.live, parts = [];
    await its.audioWorklet.addModule("recorder.js");
    const recorder = new AudioWorkletNode(its, "recorder", { numberOfInputs: 2 });
    recorder.port.onmessage = ({ data }) => parts.push(data);
    [dry, node].forEach((each, i) => each.connect(recorder, 0, i));
    recorder.connect(its.destination);
    source.start();
    await new Promise(resolve => setTimeout(resolve, 1000 * seconds));
    const tracks = [0, 1].map(k => parts.flatMap(part => [...part[k]]));
    return tracks.map(track => {
        const bytes = new Uint8Array(Float32Array.from(track).buffer);
        let text = "";
        for (const byte of bytes) text += String.fromCharCode(byte);
        return btoa(text);
    });
}"""


BUSY = "setInterval(() => { for (const t = Date.now() + 300; Date.now() < t;); }, 900)"


def test_an_impulse_comes_out_as_late_as_the_page_says_and_live_sound_never_clicks(page, separator):
    impulse = np.zeros(44100)
    impulse[22050] = 0.5
    tracks = page.evaluate(LISTEN, [impulse.tolist(), 3])
    dry, out = (np.frombuffer(base64.b64decode(track), "f4") for track in tracks)
    delay = int(np.abs(out).argmax()) - int(np.abs(dry).argmax())
    hp = separator.hp
    most = 2048 + 512 * (hp.lookahead + hp.mask_frames - 1) + 384 + round(0.026 * 44100)
    assert most - 512 < delay <= most  # less by what the sound's own blocks of 128 leave
    assert f"{round(most / 44.1)} ms behind" in page.inner_text("#live-status")
    page.click("#stop")
    page.evaluate("document.getElementById('fader').value = 1")  # the voice alone
    page.workers[1].evaluate(BUSY)
    tone = 0.3 * np.sin(np.arange(3 * 44100) / 10)
    dry, out = (
        np.frombuffer(base64.b64decode(track), "f4")
        for track in page.evaluate(LISTEN, [tone.tolist(), 3])
    )
    assert " Late for 0 ms." not in page.inner_text("#live-status")
    # A busy machine may lose input; what the page adds to its corners is a fade over 128 samples.
    corners = [np.abs(np.diff(track, 2)).max() for track in (dry, out)]
    assert corners[1] < corners[0] + 4 * 0.3 / 128
