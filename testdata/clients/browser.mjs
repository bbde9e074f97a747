// Opens a deployed app in Chromium: node browser.mjs URL [SCREENSHOT]. Prints
// what the page's clients and the app's own docs page were answered.
import { chromium } from "playwright-core";
import { readFile } from "node:fs/promises";
import { join } from "node:path";

const base = process.argv[2], here = import.meta.dirname ?? new URL(".", import.meta.url).pathname;
const imports = {};
for (const [name, file] of Object.entries({
  "@connectrpc/connect": "@connectrpc/connect/dist/esm/index.js",
  "@connectrpc/connect/protocol": "@connectrpc/connect/dist/esm/protocol/index.js",
  "@connectrpc/connect/protocol-connect": "@connectrpc/connect/dist/esm/protocol-connect/index.js",
  "@connectrpc/connect/protocol-grpc-web": "@connectrpc/connect/dist/esm/protocol-grpc-web/index.js",
  "@connectrpc/connect-web": "@connectrpc/connect-web/dist/esm/index.js",
  "@bufbuild/protobuf": "@bufbuild/protobuf/dist/esm/index.js",
  "@bufbuild/protobuf/wkt": "@bufbuild/protobuf/dist/esm/wkt/index.js",
  "@bufbuild/protobuf/codegenv2": "@bufbuild/protobuf/dist/esm/codegenv2/index.js",
  "@bufbuild/protobuf/reflect": "@bufbuild/protobuf/dist/esm/reflect/index.js",
  "@bufbuild/protobuf/wire": "@bufbuild/protobuf/dist/esm/wire/index.js",
})) imports[name] = "/page/node_modules/" + file;

// All of this waits for what happens, and only what never does ends the waiting:
// a browser begins slowly beside builds. /dev/shm is tiny in some containers.
const timeout = 180_000;
const browser = await chromium.launch({ timeout, executablePath: "/usr/bin/chromium", args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"] });
try {
  const context = await browser.newContext({ ignoreHTTPSErrors: true, colorScheme: "dark" });
  context.setDefaultTimeout(timeout);
  const page = await context.newPage();
  page.on("pageerror", (e) => console.log("page error", e.message));
  // Files of this folder stand in for a page that the app does not have.
  await page.route("**/page/**", async (route) => {
    const path = new URL(route.request().url()).pathname.slice("/page/".length);
    if (path === "") return route.fulfill({ contentType: "text/html", body: `<!doctype html><script type="importmap">${JSON.stringify({ imports })}</script>` });
    return route.fulfill({ contentType: "text/javascript", body: await readFile(join(here, path)) });
  });
  await page.goto(base + "/page/");
  for (const line of await page.evaluate(async (url) => (await import("/page/page/page.js")).run(url), base)) console.log(line);

  await page.goto(base + "/-/docs");
  const hello = page.locator('article[data-path="/helloworld.Greeter/Hello"]');
  await hello.locator("summary").click();
  await hello.locator("textarea").fill('{"name":"docs"}');
  await hello.locator("button[type=submit]").click();
  await hello.locator(".state.ok").waitFor();
  console.log("docs", JSON.stringify(JSON.parse(await hello.locator(".answer").textContent())));
  const watch = page.locator('article[data-path="/helloworld.Greeter/Watch"]');
  await watch.locator("summary").click();
  await watch.locator("textarea").fill('{"name":"docs","count":2}');
  await watch.locator("button[type=submit]").click();
  await watch.locator(".state.ok").waitFor();
  console.log("docs", (await watch.locator(".answer").textContent()).trim().split("\n").length, "messages");
  if (process.argv[3]) await page.screenshot({ path: process.argv[3], fullPage: true });
} finally {
  await browser.close();
}
