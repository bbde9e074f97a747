"use strict";
const token = document.getElementById("token");
try { token.value = sessionStorage.getItem("m3o-token") || ""; } catch (e) { /* storage may be off */ }
token.addEventListener("input", () => { try { sessionStorage.setItem("m3o-token", token.value); } catch (e) { /* as above */ } });
document.getElementById("forget").addEventListener("click", () => { token.value = ""; token.dispatchEvent(new Event("input")); });
document.getElementById("auth").addEventListener("submit", (e) => e.preventDefault());

document.getElementById("filter").addEventListener("input", (e) => {
  const want = e.target.value.toLowerCase();
  for (const li of document.querySelectorAll("nav li")) li.hidden = !li.dataset.name.toLowerCase().includes(want);
});

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch (e) { return text; }
}

// show writes an answer, and says below the button how it went.
function show(form, text, more) {
  const out = form.querySelector(".answer");
  out.hidden = false;
  out.textContent = more ? out.textContent + text + "\n" : text;
}

function state(form, text, good) {
  const s = form.querySelector(".state");
  s.textContent = text;
  s.className = "state " + (good === undefined ? "" : good ? "ok" : "bad");
}

async function call(form, path, message, streams, stop) {
  const headers = { "Content-Type": "application/json" };
  if (token.value) headers.Authorization = "Bearer " + token.value;
  const began = performance.now();
  const res = await fetch(path, { method: "POST", headers, body: message, signal: stop.signal });
  const took = () => Math.round(performance.now() - began) + " ms";
  if (!streams || !res.ok) {
    show(form, pretty(await res.text()));
    state(form, res.status + " " + res.statusText + " in " + took(), res.ok);
    return;
  }
  let rest = "", n = 0, failed = false;
  const reader = res.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    rest += value;
    for (let i; (i = rest.indexOf("\n")) >= 0; rest = rest.slice(i + 1)) {
      const line = JSON.parse(rest.slice(0, i));
      failed = "error" in line;
      show(form, JSON.stringify(line.result ?? line.error), true);
      state(form, ++n + " messages in " + took());
    }
  }
  state(form, n + " messages in " + took(), !failed);
}

// socket sends one message a line and shows what comes back.
function socket(form, path, lines, stop) {
  return new Promise((resolve) => {
    const ws = new WebSocket(location.origin.replace(/^http/, "ws") + path, token.value ? ["m3o.json", "m3o.bearer." + btoa(token.value).replace(/\+/g, "-").replace(/\//g, "_").replace(/=/g, "")] : ["m3o.json"]);
    let n = 0;
    stop.signal.addEventListener("abort", () => ws.close(1000));
    ws.onopen = () => { for (const l of lines) ws.send(l); ws.send(""); };
    ws.onmessage = (e) => { n++; show(form, e.data, true); };
    ws.onclose = (e) => { state(form, n + " messages, closed with " + e.code + (e.reason ? ": " + e.reason : ""), e.code === 1000); resolve(); };
  });
}

for (const form of document.querySelectorAll("form.try")) {
  const { path, stream, client } = form.closest("article").dataset;
  const button = form.querySelector(".stop");
  let stop;
  button.addEventListener("click", () => stop.abort());
  form.addEventListener("submit", async (e) => {
    e.preventDefault();
    if (stop) stop.abort();
    const mine = stop = new AbortController();
    const text = form.querySelector("textarea").value;
    form.querySelector(".answer").textContent = "";
    state(form, "…");
    button.hidden = stream !== "true" && client !== "true";
    try {
      if (client === "true") {
        let lines;
        try { lines = [JSON.stringify(JSON.parse(text))]; } catch (err) { lines = text.split("\n").filter((l) => l.trim()); }
        await socket(form, path, lines, mine);
      } else {
        await call(form, path, text, stream === "true", mine);
      }
    } catch (err) {
      state(form, mine.signal.aborted ? "stopped" : String(err.message || err), false);
    }
    if (mine === stop) button.hidden = true;
  });
}
