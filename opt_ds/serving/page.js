const $ = id => document.getElementById(id);
const make = (tag, text, cls) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (cls) e.className = cls; return e; };
let drawn = false, recorded = null;

fetch("api/about").then(r => r.json()).then(a => {
  $("about").textContent = `${a.preset}, ${(a.parameters / 1e6).toFixed(1)} million parameters, on ${a.device}`;
});

const pen = $("canvas").getContext("2d");
const blank = () => { pen.fillStyle = "#fff"; pen.fillRect(0, 0, 192, 192); drawn = false; };
blank();
$("clear").onclick = blank;
$("canvas").onpointermove = e => {
  if (!e.buttons) return;
  drawn = true; pen.fillStyle = $("colour").value;
  pen.beginPath(); pen.arc(e.offsetX, e.offsetY, 8, 0, 7); pen.fill();
};

// A browser records compressed sound in a container that the server does not read: it is decoded here and sent as WAV.
async function wav(blob) {
  const context = new AudioContext({sampleRate: 16000});
  const sound = await context.decodeAudioData(await blob.arrayBuffer());
  const samples = sound.getChannelData(0), view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const word = (at, s) => [...s].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  word(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); word(8, "WAVEfmt "); view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); view.setUint16(22, 1, true); view.setUint32(24, 16000, true); view.setUint32(28, 32000, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true); word(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((s, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, s)) * 32767, true));
  return new Blob([view], {type: "audio/wav"});
}
let recorder = null;
$("record").onclick = async () => {
  if (recorder) { recorder.stop(); return; }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({audio: true}), parts = [];
    recorder = new MediaRecorder(stream);
    recorder.ondataavailable = e => parts.push(e.data);
    recorder.onstop = async () => {
      stream.getTracks().forEach(t => t.stop()); recorder = null; $("record").textContent = "record";
      recorded = await wav(new Blob(parts)); show(recorded); $("recorded").textContent = "recorded";
    };
    recorder.start(); $("record").textContent = "stop";
  } catch (error) { $("recorded").textContent = `no microphone (${error.message})`; }
};
const show = sound => { $("player").src = URL.createObjectURL(sound); $("player").hidden = false; };
$("audio").onchange = () => { recorded = null; if ($("audio").files[0]) show($("audio").files[0]); };

async function inputs() {
  const data = new FormData();
  if ($("text").value.trim()) data.set("text", $("text").value);
  if ($("image").files[0]) data.set("image", $("image").files[0]);
  else if (drawn) data.set("image", await new Promise(done => $("canvas").toBlob(done, "image/png")), "drawn.png");
  const sound = recorded || $("audio").files[0];
  if (sound) data.set("audio", sound, "audio");
  return data;
}

async function ask(path, data) {
  const buttons = document.querySelectorAll("button.main");
  buttons.forEach(b => b.disabled = true);
  $("answer").replaceChildren(make("p", "…", "note"));
  try {
    const reply = await fetch(path, {method: "POST", body: data}), body = await reply.json();
    if (!reply.ok) throw new Error(typeof body.detail === "string" ? body.detail : "the input was not understood");
    return body;
  } catch (error) {
    $("answer").replaceChildren(make("p", error.message, "error"));
  } finally { buttons.forEach(b => b.disabled = false); }
}

function rows(pairs) {
  const table = make("table");
  for (const [name, value] of pairs) {
    const row = table.insertRow(); row.insertCell().textContent = name;
    const bar = make("span", "", "bar"); bar.style.width = `${Math.round(100 * Math.max(0, value))}px`;
    row.insertCell().append(bar, ` ${value.toFixed(3)}`);
  }
  return table;
}

function attention(words) {
  const box = make("div"), shown = make("div");
  for (const w of words) {
    const button = make("button", w.word, "word"); button.type = "button";
    button.onclick = () => {
      const cells = make("div", undefined, "cells"), side = Math.round(Math.sqrt(w.regions.length));
      if (side * side === w.regions.length) cells.style.gridTemplateColumns = `repeat(${side}, 1fr)`;
      w.regions.forEach(v => { const i = make("i"); i.style.opacity = v; cells.append(i); });
      const frames = make("div", undefined, "frames");
      w.frames.forEach(v => { const i = make("i"); i.style.height = `${100 * v}%`; frames.append(i); });
      shown.replaceChildren(...(w.regions.length ? [make("p", "regions", "note"), cells] : []), ...(w.frames.length ? [make("p", "frames", "note"), frames] : []));
    };
    box.append(button);
  }
  box.append(shown);
  return box;
}

$("form").onsubmit = async event => {
  event.preventDefault();
  const found = await ask("api/describe", await inputs());
  if (!found) return;
  const parts = [];
  if (found.text !== undefined) parts.push(make("h2", "Written"), Object.assign(make("p", found.text, "written"), {id: "written"}));
  found.notes.forEach(n => parts.push(make("p", n, "note")));
  if (found.matching) parts.push(make("h2", "What belongs together"), rows(Object.entries(found.matching).map(([k, v]) => [k.replace("_", " + "), v])));
  if (found.neighbours) parts.push(make("h2", "Nearest in the store"), rows(found.neighbours.map(n => [n.caption || n.name, n.cosine])));
  const sees = (found.attention || []).filter(w => w.regions.length || w.frames.length);
  if (sees.length) parts.push(make("h2", "Attention of a word (choose one)"), attention(sees));
  $("answer").replaceChildren(...parts);
};
$("generate").onclick = async () => {
  const found = await ask("api/generate_image", await inputs());
  if (!found) return;
  const box = make("p", undefined, "images"), compared = found.images.some(p => p.matching !== null);
  for (const p of found.images) {
    const image = make("img"); image.src = p.png; image.alt = "generated image";
    image.title = p.matching === null ? "" : `matching ${p.matching.toFixed(3)}`; box.append(image);
  }
  $("answer").replaceChildren(make("h2", compared ? "Generated images, best match first" : "Generated images"), box, ...found.notes.map(n => make("p", n, "note")));
};
