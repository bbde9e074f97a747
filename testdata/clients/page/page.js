// Runs in the browser: the clients of npm, by both protocols, in both codecs.
import { createClient } from "@connectrpc/connect";
import { createConnectTransport, createGrpcWebTransport } from "@connectrpc/connect-web";
import { createFileRegistry, fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorSetSchema } from "@bufbuild/protobuf/wkt";

export async function run(baseUrl) {
  const said = [];
  const bytes = new Uint8Array(await (await fetch(baseUrl + "/-/descriptor.binpb")).arrayBuffer());
  const greeter = createFileRegistry(fromBinary(FileDescriptorSetSchema, bytes)).getService("helloworld.Greeter");
  for (const [name, make] of [["connect", createConnectTransport], ["grpc-web", createGrpcWebTransport]]) {
    for (const useBinaryFormat of [true, false]) {
      const client = createClient(greeter, make({ baseUrl, useBinaryFormat }));
      const got = [(await client.hello({ name: "Ada" })).msg];
      for await (const m of client.watch({ name: "Ada", count: 3 })) got.push(m.number);
      try {
        for await (const m of client.watch({ count: 0 })) got.push(m.number);
      } catch (err) {
        got.push(err.code);
      }
      said.push(name + (useBinaryFormat ? " binary " : " JSON ") + got.join(" "));
    }
  }
  return said;
}
